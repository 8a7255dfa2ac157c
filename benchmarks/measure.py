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
            elapsed_s = seconds(candidates[name])
            if number >= warm_up:
                times[name].append(elapsed_s)
    return times


def seconds(candidate: Callable[[], object]) -> float:
    """Of one call, by the GPU's clock where there is a GPU."""
    if not torch.cuda.is_available():
        start_s = time.perf_counter()
        candidate()
        return time.perf_counter() - start_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    candidate()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def gemm_ceiling(rounds: int = 20) -> float:
    """FLOP/s of a large product of random matrices, the best of the rounds: bf16 8192^3 on a GPU, fp32 1024^3 else.

    Random, because a product of zeros draws less power and runs faster.
    """
    device, dtype, size = ("cuda", torch.bfloat16, 8192) if torch.cuda.is_available() else ("cpu", torch.float32, 1024)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = interleave({"product": lambda: a @ b}, rounds, warm_up=3)
    return 2 * size**3 / min(times["product"])


def peak_memory_bytes(candidate: Callable[[], object]) -> int | None:
    """Most GPU memory in use during one call, all that was there before included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    candidate()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


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
    today = {"date": datetime.date.today().isoformat(), "machine": machine()}
    result = {**today, **figures, **today}  # figures may be an older file's, some of them new
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file


def write_table(name: str, text: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->` in the README, and print it."""
    readme = RESULTS.parent.parent / "README.md"
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = readme.read_text().split(begin)
    readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
    print(text)
