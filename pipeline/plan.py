"""Which sample is in which step: a pure function of the samples' sizes, the seed and the step.

The number of workers plays no part. A step is a fixed number of packs under a token budget; rank r of w takes packs
r, r + w, ... of it. So a run can resume, or go on with more or fewer workers, and see the same samples in the same
order.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

Pack = tuple[int, ...]  # places of samples in the data set
Step = tuple[Pack, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How steps are made.

    Attributes:
        token_budget: most tokens in a pack: what one forward pass holds in memory.
        packs_per_step: packs in a step, over all workers; the batch is their product.
        quadratic_tokens: sequence length at which attention costs as much as all linear layers, 2 d + ffn_dim;
            balances packs of few long samples against packs of many short ones.
        window_steps: how many steps' worth of shuffled samples are packed together: more fill better, fewer shuffle
            better.
        seed: of the shuffles.
    """

    token_budget: int = 2048
    packs_per_step: int = 2
    quadratic_tokens: int = 4096
    window_steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("token_budget", "packs_per_step", "quadratic_tokens", "window_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


def plan_epoch(num_tokens: Sequence[int], config: PlanConfig, epoch: int) -> list[Step]:
    """All samples once, in steps of `packs_per_step` packs; only the last step may have fewer.

    Args:
        num_tokens: tokens of each sample.
        config: budget, batch and seed.
        epoch: reshuffles.

    Raises:
        ValueError: no samples, or one that is longer than the budget.
    """
    if not len(num_tokens):
        raise ValueError("no samples to plan: the data set is empty")
    if max(num_tokens) > config.token_budget:
        raise ValueError(
            f"token_budget={config.token_budget} is less than the longest sample: set it to at least {max(num_tokens)}"
        )
    random = np.random.Generator(np.random.Philox(key=[config.seed, epoch]))
    packs = _pack_in_windows(random.permutation(len(num_tokens)).tolist(), num_tokens, config)
    packs.sort(key=lambda pack: _cost(pack, num_tokens, config))
    size = config.packs_per_step
    leftover = len(packs) % size
    steps = [tuple(packs[i : i + size]) for i in range(leftover, len(packs), size)]  # of like cost: no rank waits
    steps = [steps[i] for i in random.permutation(len(steps))]
    return steps + ([tuple(packs[:leftover])] if leftover else [])


def iterate_steps(num_tokens: Sequence[int], config: PlanConfig, start: int = 0) -> Iterator[tuple[int, Step]]:
    """(step, packs) from step `start` on, epoch after epoch, without end."""
    step, epoch = 0, 0
    while True:
        for packs in plan_epoch(num_tokens, config, epoch):
            if step >= start:
                yield step, packs
            step += 1
        epoch += 1


def packs_of_rank(step: Step, rank: int, world_size: int) -> list[tuple[Pack, float]]:
    """The packs that a rank runs, each with its weight, as many on every rank.

    A rank left without a pack runs one of the others' with weight zero: FSDP needs every rank in every collective.
    """
    rounds = -(-len(step) // world_size)
    places = [rank + k * world_size for k in range(rounds)]
    return [(step[place], 1.0) if place < len(step) else (step[0], 0.0) for place in places]


def _pack_in_windows(order: list[int], num_tokens: Sequence[int], config: PlanConfig) -> list[Pack]:
    """Pack the shuffled samples a window at a time; each window's emptiest pack is filled up in the next."""
    window_tokens = config.window_steps * config.packs_per_step * config.token_budget
    packs: list[Pack] = []
    window: list[int] = []
    filled = 0
    for place in order:
        window.append(place)
        filled += num_tokens[place]
        if filled >= window_tokens:
            made = _best_fit_decreasing(window, num_tokens, config.token_budget)
            emptiest = min(made, key=lambda pack: sum(num_tokens[place] for place in pack))
            packs += [pack for pack in made if pack is not emptiest]
            window = list(emptiest)
            filled = sum(num_tokens[place] for place in window)
    return packs + _best_fit_decreasing(window, num_tokens, config.token_budget)


def _best_fit_decreasing(places: list[int], num_tokens: Sequence[int], budget: int) -> list[Pack]:
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


def _cost(pack: Pack, num_tokens: Sequence[int], config: PlanConfig) -> float:
    return sum(num_tokens[place] * (1 + num_tokens[place] / config.quadratic_tokens) for place in pack)
