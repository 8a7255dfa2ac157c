"""Progress of a training run, shown by the driver from the metrics file that the run writes."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class Stopwatch:
    """Wall-clock seconds of a with-block."""

    elapsed_s = 0.0

    def __enter__(self) -> Stopwatch:
        self._start_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.elapsed_s = time.monotonic() - self._start_s


@contextmanager
def watch(metrics: Path, num_steps: int, label: str) -> Iterator[None]:
    """Show loss, tokens/s and ETA while the block runs: a bar on a terminal, else a line every ten seconds."""
    stop = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(metrics, num_steps, label, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show_bar(metrics: Path, num_steps: int, label: str, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=num_steps, figures="starting workers")
        while True:
            ended = stop.wait(0.5)
            rows = _recent(metrics)
            if rows:
                bar.update(task, completed=rows[-1]["step"] + 1, figures=_figures(rows))
            if ended:
                return


def _show_lines(metrics: Path, num_steps: int, label: str, stop: threading.Event) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    shown = -1
    while True:
        ended = stop.wait(LINE_EVERY_S)
        rows = _recent(metrics)
        if rows and rows[-1]["step"] != shown:
            shown = int(rows[-1]["step"])
            left_s = (num_steps - shown - 1) * _mean(rows, "step_s")
            console.print(f"{label} {shown + 1}/{num_steps}  {_figures(rows)}  {left_s:.0f} s left")
        if ended:
            return


def _figures(rows: list[dict[str, float]]) -> str:
    tokens_per_s = _mean(rows, "num_tokens") / max(1e-9, _mean(rows, "step_s"))
    return f"loss {_mean(rows, 'loss'):.4f}  {tokens_per_s:,.0f} tokens/s"


def _mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _recent(metrics: Path, num_rows: int = 20, tail_bytes: int = 16384) -> list[dict[str, float]]:
    """The last complete rows of the file."""
    if not metrics.exists():
        return []
    with metrics.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - tail_bytes))
        lines = file.read().decode().split("\n")
    whole = [line for line in lines[:-1] if line.startswith("{")]
    return [json.loads(line) for line in whole[-num_rows:]]
