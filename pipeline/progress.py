"""Progress that the driver shows: of a training run, from the metrics file that the run writes, and of rows."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.console import run_card
from pipeline.metrics_log import TRAIN_LOG
from pipeline.run_card import CARD, RunCard

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
def watch(folder: Path, num_steps: int, label: str) -> Iterator[None]:
    """Show a run's card, then loss, tokens/s and ETA while the block runs: a bar on a terminal, else lines.

    Args:
        folder: where the run will write its metrics; an earlier attempt's card is removed.
        num_steps: of the run.
        label: for the bar.
    """
    (folder / CARD).unlink(missing_ok=True)
    stop = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(folder, num_steps, label, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def rows(label: str, num_rows: int, num_done: int) -> Iterator[Callable[[int, int], None]]:
    """Show rows, rejects, rate and ETA of a hop: a bar on a terminal, else a line every ten seconds.

    Args:
        label: the hop.
        num_rows: to do in all.
        num_done: that an earlier run did.

    Yields:
        what to call with the rows and rejects of a task that ended.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = _columns()
    start_s = shown_s = time.monotonic()
    done = rejects = 0
    if num_done > 0:
        console.print(f"{label}: {num_done:,} of {num_rows:,} rows are done already")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=num_rows, completed=num_done, figures="starting workers")

        def advance(num_more: int, num_rejects: int) -> None:
            nonlocal done, rejects, shown_s
            done, rejects, now_s = done + num_more, rejects + num_rejects, time.monotonic()
            rate = done / max(1e-9, now_s - start_s)
            figures = f"{rate:,.1f} rows/s, {rejects:,} rejects"
            bar.update(task, completed=num_done + done, figures=figures)
            if not console.is_terminal and now_s - shown_s >= LINE_EVERY_S:
                shown_s = now_s
                left_s = (num_rows - num_done - done) / rate
                console.print(f"{label} {num_done + done:,}/{num_rows:,}  {figures}  {left_s:.0f} s left")

        yield advance


def _show_bar(folder: Path, num_steps: int, label: str, stop: threading.Event) -> None:
    console, card = Console(stderr=True), None
    with Progress(*_columns(), console=console) as bar:
        task = bar.add_task(label, total=num_steps, figures="starting workers")
        while True:
            ended = stop.wait(0.5)
            card = card or _show_card(folder, label, console)
            rows = _recent(folder / TRAIN_LOG)
            if rows:
                bar.update(task, completed=rows[-1]["step"] + 1, figures=_figures(rows, card))
            if ended:
                return


def _columns() -> tuple[ProgressColumn, ...]:
    figures = TextColumn("{task.fields[figures]}")
    counts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return (*counts, figures, TimeElapsedColumn(), TimeRemainingColumn())


def _show_lines(folder: Path, num_steps: int, label: str, stop: threading.Event) -> None:
    console, card = Console(stderr=True, highlight=False, soft_wrap=True), None
    shown = -1
    while True:
        ended = stop.wait(LINE_EVERY_S)
        card = card or _show_card(folder, label, console)
        rows = _recent(folder / TRAIN_LOG)
        if rows and rows[-1]["step"] != shown:
            shown = int(rows[-1]["step"])
            left_s = (num_steps - shown - 1) * _mean(rows, "step_s")
            console.print(f"{label} {shown + 1}/{num_steps}  {_figures(rows, card)}  {left_s:.0f} s left")
        if ended:
            return


def _show_card(folder: Path, label: str, console: Console) -> RunCard | None:
    """Show the run's card once it is there."""
    file = folder / CARD
    if not file.exists():
        return None
    card = RunCard(**json.loads(file.read_text()))
    console.print(run_card(card, label))
    return card


def _figures(rows: list[dict[str, float]], card: RunCard | None) -> str:
    step_s = max(1e-9, _mean(rows, "step_s"))
    text = f"loss {_mean(rows, 'loss'):.4f}  {_mean(rows, 'num_tokens') / step_s:,.0f} tokens/s"
    if "mfu" in rows[-1]:
        text += f"  {_mean(rows, 'mfu'):.0%} MFU"
    text += f"  data wait {_mean(rows, 'data_wait_s') / step_s:.0%}"
    if card is None:
        return text
    done = int(rows[-1]["step"]) + 1
    left = min(card.checkpoint_every - done % card.checkpoint_every, card.num_steps - done)
    return f"{text}  checkpoint in {left * step_s:.0f} s"


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
