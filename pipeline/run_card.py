"""What a training run is, told before its first step, from the model, the data and the plan that its processes hold."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from pipeline.plan import Pack, Plan
from video_dit.training import TrainState

CARD = "card.json"  # its file, among the metrics
PLANNED_STEPS = 64  # whose mean size is told


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCard:
    """A run's size.

    Attributes:
        num_parameters, num_trained: of the model, and those of them that are trained.
        num_workers: processes that share each step.
        num_samples, num_held_out, num_rejected: trained on, measured only, and too long for any pack.
        start_step, num_steps: the first step that is to come, and how many there are in all.
        tokens_per_step, samples_per_step: means over the next steps, of all processes.
        fill: share of the packs' token budgets that is used.
        held_bytes: of weights, average, gradients and moments, in each process.
        checkpoint_bytes: on disk, all shards of one checkpoint.
        checkpoint_every: steps between checkpoints.
        flops_per_step: model operations, of all processes; 0 where nobody counted them.
        peak_flops: of all processes together, a second; 0 where it is not known.
    """

    num_parameters: int
    num_trained: int
    num_workers: int
    num_samples: int
    num_held_out: int
    num_rejected: int
    start_step: int
    num_steps: int
    tokens_per_step: float
    samples_per_step: float
    fill: float
    held_bytes: int
    checkpoint_bytes: int
    checkpoint_every: int
    flops_per_step: float
    peak_flops: float

    @property
    def num_epochs(self) -> float:
        """How often each sample is seen in the whole run, on average."""
        return self.num_steps * self.samples_per_step / max(1, self.num_samples)


def card_of(
    state: TrainState, plan: Plan, flops: Callable[[Pack], float], *, num_steps: int, checkpoint_every: int, peak: float
) -> RunCard:
    """The card of a run that is about to begin, or to go on.

    Args:
        state: model and optimizers, restored.
        plan: of the run.
        flops: of a pack.
        num_steps: of the run.
        checkpoint_every: steps between checkpoints.
        peak: operations a second of all processes together.
    """
    steps = [step for _, step in itertools.islice(plan.steps(state.step), PLANNED_STEPS)]
    packs = [pack for step in steps for pack in step.packs]
    num_tokens = int(plan.samples.num_tokens[list(itertools.chain.from_iterable(packs))].sum())
    budget = sum(plan.config.budget_of(step) * len(step.packs) for step in steps)
    parameters = list(state.model.parameters())
    num_held_out = int(plan.samples.is_held_out.sum())
    return RunCard(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        num_workers=state.world.size,
        num_samples=len(plan.samples.num_tokens) - num_held_out - len(plan.rejected),
        num_held_out=num_held_out,
        num_rejected=len(plan.rejected),
        start_step=state.step,
        num_steps=num_steps,
        tokens_per_step=num_tokens / len(steps),
        samples_per_step=sum(map(len, packs)) / len(steps),
        fill=num_tokens / budget,
        held_bytes=state.held_bytes,
        checkpoint_bytes=state.saved_bytes,
        checkpoint_every=checkpoint_every,
        flops_per_step=sum(map(flops, packs)) / len(steps),
        peak_flops=peak,
    )
