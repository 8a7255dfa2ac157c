"""Which sample is in which step: a pure function of the samples' sizes, the seed and the step.

The number of workers plays no part. A step is a fixed number of packs under a token budget; rank r of w takes packs
r, r + w, ... of it. So a run can resume, or go on with more or fewer workers, and see the same samples in the same
order.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.mixture import Mixture, Samples, StageConfig, keyed_random

Pack = tuple[int, ...]  # places of samples in the data


class Step(NamedTuple):
    """What is summed up before an update.

    Attributes:
        packs: of samples.
        is_shared: whether each pack is longer than a process can hold, and run by `PlanConfig.context_size` of them.
    """

    packs: tuple[Pack, ...]
    is_shared: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How steps are made.

    Attributes:
        token_budget: most tokens in a pack: what one forward pass holds in memory.
        packs_per_step: packs in a step, over all workers; the batch is their product.
        quadratic_tokens: sequence length at which attention costs as much as all linear layers, 2 d + ffn_dim;
            balances packs of few long samples against packs of many short ones.
        window_steps: how many steps' worth of shuffled samples are packed together: more fill and balance better, fewer
            shuffle better.
        context_size: processes that share a pack of samples longer than the budget, up to context_size times as long;
            longer ones are rejected.
        stages: what changes in the course of the run; () is one stage of all samples.
        seed: of the shuffles.
    """

    token_budget: int = 2048
    packs_per_step: int = 2
    quadratic_tokens: int = 4096
    window_steps: int = 256
    context_size: int = 1
    stages: tuple[StageConfig, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("token_budget", "packs_per_step", "quadratic_tokens", "window_steps", "context_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        firsts = [stage.first_step for stage in self.stages]
        if firsts and (firsts[0] != 0 or any(a >= b for a, b in itertools.pairwise(firsts))):
            raise ValueError(f"stages: first_step={firsts}: must begin with 0 and grow")

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that there is a pack for."""
        return self.token_budget * self.context_size

    def budget_of(self, step: Step) -> int:
        """Most tokens of each of its packs."""
        return self.longest if step.is_shared else self.token_budget


class Plan:
    """All steps of a run over some samples.

    Args:
        samples: sizes and kinds.
        config: budget, batch, stages and seed.

    Attributes:
        samples, config: as given.
        rejected: places of samples that are too long for any pack.

    Raises:
        ValueError: a stage without samples, or one whose data sets are not those of the samples.
    """

    def __init__(self, samples: Samples, config: PlanConfig) -> None:
        self.samples, self.config = samples, config
        self._num_tokens = samples.num_tokens.tolist()
        self._cost = (samples.num_tokens * (1 + samples.num_tokens / config.quadratic_tokens)).tolist()
        fits = samples.num_tokens <= config.longest
        self.rejected: list[int] = np.flatnonzero(~fits & ~samples.is_held_out).tolist()
        if len(samples.num_tokens) and not fits.any():
            raise ValueError(
                f"token_budget={config.token_budget} is less than the shortest sample: set it to at least "
                f"{min(self._num_tokens)}"
            )
        kept = fits & ~samples.is_held_out
        stages = config.stages or (StageConfig(),)
        self._stages = [(stage, Mixture(samples, kept, stage, config.seed)) for stage in stages]

    def steps(self, start: int = 0) -> Iterator[tuple[int, Step]]:
        """(number, step) from number `start` on, epoch after epoch, stage after stage, without end."""
        ends: list[float] = [stage.first_step for stage, _ in self._stages[1:]]
        number = 0
        for which, end in enumerate([*ends, float("inf")]):
            epoch = 0
            while number < end:
                for step in self.epoch(epoch, which):
                    if number >= end:
                        break
                    if number >= start:
                        yield number, step
                    number += 1
                epoch += 1

    def epoch(self, epoch: int, stage: int = 0) -> list[Step]:
        """The steps of one epoch of a stage; only the last of either kind may have fewer packs than the others.

        Args:
            epoch: of the stage, reshuffles.
            stage: its number.
        """
        config, (settings, mixture) = self.config, self._stages[stage]
        ordinary: list[int] = []
        long: list[int] = []
        for place in mixture.epoch(epoch):
            (ordinary if self._num_tokens[place] <= config.token_budget else long).append(place)
        size = settings.packs_per_step or config.packs_per_step
        steps, rest = self._steps_of(ordinary, config.token_budget, size)
        shared, shared_rest = self._steps_of(long, config.longest, max(1, size // config.context_size))
        whole = [Step(tuple(packs)) for packs in steps] + [Step(tuple(packs), is_shared=True) for packs in shared]
        last = [Step(tuple(rest))] if rest else []
        last += [Step(tuple(shared_rest), is_shared=True)] if shared_rest else []
        order = keyed_random(config.seed, settings.first_step, epoch, len(whole)).permutation(len(whole))
        return [whole[place] for place in order] + last

    def _steps_of(self, places: list[int], budget: int, size: int) -> tuple[list[list[Pack]], list[Pack]]:
        """Groups of `size` packs that cost alike, and the fewer packs that are left.

        Samples are packed a window at a time; its emptiest packs are opened again in the next.
        """
        groups: list[list[Pack]] = []
        window: list[int] = []
        filled = 0
        for place in places:
            window.append(place)
            filled += self._num_tokens[place]
            if filled >= self.config.window_steps * size * budget:
                made, open_packs = self._groups_of(window, budget, size)
                groups += made
                window = [place for pack in open_packs for place in pack]
                filled = sum(self._num_tokens[place] for place in window)
        made, rest = self._groups_of(window, budget, size)
        return groups + made, rest

    def _groups_of(self, places: list[int], budget: int, size: int) -> tuple[list[list[Pack]], list[Pack]]:
        packs = best_fit_decreasing(places, self._num_tokens, budget)
        packs.sort(key=lambda pack: sum(self._num_tokens[place] for place in pack))
        num_left = len(packs) % size
        full = sorted(packs[num_left:], key=lambda pack: sum(self._cost[place] for place in pack))
        return [full[first : first + size] for first in range(0, len(full), size)], packs[:num_left]


def packs_of_rank(step: Step, rank: int, world_size: int) -> list[tuple[Pack, float]]:
    """The packs that a rank runs, each with its weight, as many on every rank.

    A rank left without a pack runs one of the others' with weight zero: FSDP needs every rank in every collective.
    """
    rounds = -(-len(step.packs) // world_size)
    places = [rank + k * world_size for k in range(rounds)]
    return [(step.packs[place], 1.0) if place < len(step.packs) else (step.packs[0], 0.0) for place in places]


def best_fit_decreasing(places: Sequence[int], num_tokens: Sequence[int], budget: int) -> list[Pack]:
    """Bins filled longest sample first; among the bins it fits in, a sample goes to the fullest (best fit)."""
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: list[list[int]] = []
    for place in sorted(places, key=lambda place: -num_tokens[place]):
        tokens = num_tokens[place]
        at = bisect.bisect_left(free, (tokens, -1))
        if at == len(free):
            bins.append([])
            room, which = budget, len(bins) - 1
        else:
            room, which = free.pop(at)
        bins[which].append(place)
        bisect.insort(free, (room - tokens, which))
    return [tuple(sorted(members)) for members in bins]
