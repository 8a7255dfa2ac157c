"""Sampling with fewer blocks: where a sample changes little from one step to the next, most of the model is not run.

The first block is always run. As long as its update of a sample's tokens stays within `threshold` of what it was when
the other blocks were last run for that sample, their update is taken from then (the "first block cache" of
ParaAttention, a simpler TeaCache, arXiv 2411.19108). Each sample of a pack is judged alone, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from video_dit.layers import TextKeys
from video_dit.packing import PackedBatch

if TYPE_CHECKING:
    from video_dit.model import VideoDiT


class Update(NamedTuple):
    """What the first block and all the others added to a sample's tokens, n d each, when all were run."""

    first: Tensor
    others: Tensor


class StepCache:
    """The updates of the samples of one sampling; a new one for each.

    Args:
        thresholds: one a sample, in the pack's order: the first block's relative change up to which the others are not
            run. 0 always runs them. A guided pack holds its samples twice: give them twice.

    Attributes:
        num_run, num_asked: how often the other blocks were run for a sample, and could have been.
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self.updates: dict[int, Update] = {}
        self.num_run = self.num_asked = 0

    def run_blocks(
        self,
        model: VideoDiT,
        x: Tensor,
        packed: PackedBatch,
        time: Tensor,
        text_keys: Sequence[TextKeys] | None = None,
    ) -> Tensor:
        """As `VideoDiT.run_blocks`, nearly: x n d and time f d to n d."""
        lengths = packed.lengths
        after_first = model.run_blocks(x, packed, time, slice(1), text_keys)  # n d
        firsts = (after_first - x).split(lengths)
        stale = [place for place, first in enumerate(firsts) if self._is_stale(place, first)]
        self.num_run, self.num_asked = self.num_run + len(stale), self.num_asked + len(lengths)
        if stale:
            are_all = len(stale) == len(lengths)
            some = packed if are_all else packed.select(stale)
            parts = after_first.split(lengths)
            start = torch.cat([parts[place] for place in stale])
            end = model.run_blocks(start, some, model.embed_time(some), slice(1, None), text_keys if are_all else None)
            for place, others in zip(stale, (end - start).split([lengths[place] for place in stale]), strict=True):
                self.updates[place] = Update(firsts[place], others)
        return after_first + torch.cat([self.updates[place].others for place in range(len(lengths))])

    def _is_stale(self, place: int, first: Tensor) -> bool:
        if place not in self.updates or not self.thresholds[place]:
            return True
        before = self.updates[place].first
        return bool((first - before).abs().mean() > self.thresholds[place] * before.abs().mean())
