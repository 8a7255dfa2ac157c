"""Side-by-side timing: candidates take turns, and what counts is the ratio of neighbours, since machines are noisy."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Ratio(NamedTuple):
    """How many times faster ours is than a peer: median over the rounds, with the quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; in every other round they go in reverse order."""
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for name in names if number % 2 else names[::-1]:
            start_s = time.perf_counter()
            candidates[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start_s)
    return times


def ratio(times: Mapping[str, list[float]], ours: str, peer: str) -> Ratio:
    """How many times faster `ours` is than `peer`, round by round."""
    ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Ratio(low, statistics.median(ratios), high)


def machine() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads, kind = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{threads} threads of {os.cpu_count()} cores {platform.machine()} ({kind}), torch {torch.__version__}"


def write_result(name: str, figures: Mapping[str, object]) -> Path:
    """`results/<name>.json` with date and machine."""
    file = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    result = {"date": datetime.date.today().isoformat(), "machine": machine(), **figures}
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file
