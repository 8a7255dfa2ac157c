"""What jobs tell people: a line a hop, tables, and the command to run next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from pipeline import store


def hop_done(label: str, manifest: store.Manifest, elapsed_s: float) -> None:
    """Say what a hop made, how long it took and where it is."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in manifest.counts.items())
    _console().print(f"[bold]{label:<12}[/bold] {elapsed_s:7.1f} s   {counts}   {manifest.uri}")


def reject_table(manifest: store.Manifest, reasons: Sequence[tuple[str, int]]) -> None:
    """Show what came of a hop's rows, and why some were refused."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in manifest.counts.items())
    table = Table(title=f"{manifest.verb} {manifest.name}: {counts}", title_justify="left")
    table.add_column("refused")
    table.add_column("rows", justify="right")
    for reason, count in reasons:
        table.add_row(reason, f"{count:,}")
    _console().print(table)


def score_table(scores: Mapping[str, float]) -> None:
    """Show the share of right videos by attribute."""
    table = Table(title="held-out combinations: share right", title_justify="left")
    table.add_column("attribute")
    table.add_column("right", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{100 * value:.1f} %")
    _console().print(table)


def accuracy_table(accuracy: Mapping[str, Mapping[str, float]]) -> None:
    """Show the share of samples whose class is told right, attribute by noise level."""
    table = Table(title="held-out clips: share told right at noise level", title_justify="left")
    table.add_column("attribute")
    for level in next(iter(accuracy.values())):
        table.add_column(level, justify="right")
    for name, row in accuracy.items():
        table.add_row(name, *(f"{100 * share:.1f} %" for share in row.values()))
    _console().print(table)


def say(text: str) -> None:
    """A line for people."""
    _console().print(text, markup=False)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
