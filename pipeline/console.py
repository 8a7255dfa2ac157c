"""What jobs tell people: a line a hop, tables, and the command to run next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from pipeline import store

if TYPE_CHECKING:
    from pipeline.estimate import Estimate
    from pipeline.run_card import RunCard


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


def reconstruction_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Show what a VAE makes of clips, by their shape: see `pipeline.reconstruction.reconstruction_table`."""
    table = Table(title="reconstruction of clips", title_justify="left")
    for name in ("shape", "clips", "PSNR", "SSIM"):
        table.add_column(name, justify="right")
    for shape, row in rows.items():
        table.add_row(shape, f"{row['clips']:,.0f}", f"{row['psnr_db']:.1f} dB", f"{row['ssim']:.3f}")
    _console().print(table)


def estimate_card(found: Estimate, num_gpus: int, gpu: str, utilisation: float) -> None:
    """Show what a training run will need."""
    rows = {
        "parameters": f"{found.num_parameters:,}",
        "tokens per step": f"{found.tokens_per_step:,}",
        "operations per step": f"{found.flops_per_step:.3g}",
        "memory of a GPU": readable(found.memory_bytes),
        "  weights, average, gradients, moments": readable(found.state_bytes),
        "  gathered weights": readable(found.gathered_bytes),
        "  activations of a pack": readable(found.activation_bytes),
        "a checkpoint on disk": readable(found.checkpoint_bytes),
    }
    if found.step_s is not None and found.hours is not None:
        rows[f"a step, at {utilisation:.0%} of the peak"] = f"{found.step_s:.3g} s"
        rows[f"{found.num_steps:,} steps"] = f"{found.hours:,.2f} h"
    _console().print(_card(f"training on {num_gpus} x {gpu}", rows))


def run_card(card: RunCard, label: str) -> Table:
    """What a training run is that is about to begin."""
    trained = f", {card.num_trained:,} trained" if card.num_trained < card.num_parameters else ""
    left_out = [f"{card.num_held_out:,} held out"] * (card.num_held_out > 0)
    left_out += [f"{card.num_rejected:,} too long"] * (card.num_rejected > 0)
    rows = {
        "parameters": f"{card.num_parameters:,}{trained}",
        "samples": ", ".join([f"{card.num_samples:,}", *left_out]),
        "steps": f"{card.start_step:,} to {card.num_steps:,}, {card.num_epochs:.1f} epochs in all",
        "a step": f"{card.samples_per_step:,.0f} samples, {card.tokens_per_step:,.0f} tokens",
        "packs": f"{card.fill:.1%} full",
        "workers": f"{card.num_workers}",
        "each holds": f"{readable(card.held_bytes)} of weights, average, gradients and moments, and activations",
        "a checkpoint": f"{readable(card.checkpoint_bytes)}, every {card.checkpoint_every:,} steps",
    }
    if card.flops_per_step and card.peak_flops:
        hours = (card.num_steps - card.start_step) * card.flops_per_step / card.peak_flops / 3600
        rows["at the devices' peak"] = f"{hours:,.2f} h; trainings reach a third of it at best"
    return _card(label, rows)


def _card(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def readable(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    power = min(4, int(math.log(max(num_bytes, 1), 1000)))
    return f"{num_bytes / 1000**power:.1f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


def say(text: str) -> None:
    """A line for people."""
    _console().print(text, markup=False)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
