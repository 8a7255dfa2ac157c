"""One step of training: gradients of all micro-batches on all processes, and one update."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from video_dit.training import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        inputs: whatever the loss function takes.
        weight: 1, or 0 for a pass that only keeps a rank in step with the others.
        sample_ids: for error messages.
    """

    inputs: Any
    weight: float
    sample_ids: tuple[str, ...]


class Losses(NamedTuple):
    """What a loss function finds in a micro-batch.

    Attributes:
        trained: sums over its elements, by name; all of them are trained, and logged.
        logged: figures for the log alone, by name: a sum and how many values it has; the log shows their mean over the
            step. Every call names the same.
    """

    trained: Mapping[str, Tensor]
    logged: Mapping[str, tuple[Tensor, Tensor]]


# Losses, or only what is trained, or only a sum, "loss".
LossFunction = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor] | Losses]


NUM_NAMED = 16  # samples in an error message


class NotFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not finite; the weights were not touched."""


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    loss_function: LossFunction,
    num_elements: float,
) -> dict[str, float]:
    """One update from all micro-batches of all processes.

    Args:
        state: changed in place.
        micro_batches: this process's share, as many in every process.
        loss_function: (model, inputs) -> loss summed over elements (tokens, pixels), several by name, or `Losses`.
        num_elements: of the whole step, over all processes: the loss is the mean over them.

    Returns:
        loss, grad_norm and lr of the step; the losses that have a name, and means for the log, where there are values;
        grad_norm_PART and lr_PART of named parts.

    Raises:
        NotFiniteError: before the update, naming the step and this process's samples.
    """
    metrics = _backward(state, micro_batches, loss_function, num_elements)
    for part in state.parts:
        suffix = part.name and f"_{part.name}"
        norm = torch.nn.utils.clip_grad_norm_(part.parameters, part.config.clip_norm)
        metrics[f"grad_norm{suffix}"] = float(state.world.whole(norm))
        metrics[f"lr{suffix}"] = part.config.learning_rate * part.config.fraction_at(state.step)
    if not all(map(math.isfinite, metrics.values())):
        ids = [name for batch in micro_batches for name in batch.sample_ids]
        more = f" and {len(ids) - NUM_NAMED} more" if len(ids) > NUM_NAMED else ""
        figures = f"loss={metrics['loss']}, grad_norm={metrics['grad_norm']}"
        raise NotFiniteError(f"step {state.step}: {figures}; samples: {', '.join(ids[:NUM_NAMED])}{more}")
    state.update()
    return metrics


def _backward(
    state: TrainState, micro_batches: Sequence[MicroBatch], loss_function: LossFunction, num_elements: float
) -> dict[str, float]:
    """Gradients of the step; its losses, and means for the log, over all processes."""
    world = state.world
    totals: dict[str, Tensor] = defaultdict(
        lambda: torch.zeros(2, dtype=torch.float64)
    )  # a sum, and of how many values
    for batch in micro_batches:
        losses = _as_losses(loss_function(state.model, batch.inputs))
        shares = {name: loss * (batch.weight / num_elements) for name, loss in losses.trained.items()}
        total = torch.stack(list(shares.values())).sum()
        (total * world.size).backward()  # sharded gradients are averaged over processes; the sum is wanted
        for name, share in {"loss": total, **shares}.items():
            totals[name][0] += share.detach().double().cpu()
        for name, figures in losses.logged.items():
            totals[name] += batch.weight * torch.stack(figures).detach().double().cpu()
    logged = set(losses.logged)
    sums = world.sum(torch.stack(list(totals.values()))).tolist()
    return {
        name: value / count if name in logged else value
        for name, (value, count) in zip(totals, sums, strict=True)
        if count or name not in logged
    }


def _as_losses(found: Tensor | Mapping[str, Tensor] | Losses) -> Losses:
    if isinstance(found, Losses):
        return found
    return Losses({"loss": found} if isinstance(found, Tensor) else found, {})
