"""The samples of an epoch and their order: data sets by weight, images and videos by share, all by seed alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Part of a run: low resolution first, say, or images first.

    Attributes:
        first_step: at which it begins.
        repeats: how often an epoch has each sample, by data set, in their order. 0 leaves a data set out; of 0.5, two
            epochs have each sample once. () is all of them once.
        image_fraction: share of images among an epoch's samples; videos are as many as `repeats` says. 0 is none, 1 is
            images alone, None takes images as they come.
        packs_per_step: None is the plan's.
    """

    first_step: int = 0
    repeats: tuple[float, ...] = ()
    image_fraction: float | None = None
    packs_per_step: int | None = None

    def __post_init__(self) -> None:
        if self.first_step < 0:
            raise ValueError(f"first_step={self.first_step}: must not be negative")
        if any(not 0 <= value < math.inf for value in self.repeats) or (self.repeats and not any(self.repeats)):
            raise ValueError(f"repeats={self.repeats}: must be numbers from 0 on, not all 0")
        if self.image_fraction is not None and not 0 <= self.image_fraction <= 1:
            raise ValueError(f"image_fraction={self.image_fraction}: must be between 0 and 1, or None")
        if self.packs_per_step is not None and self.packs_per_step < 1:
            raise ValueError(f"packs_per_step={self.packs_per_step}: must be at least 1, or None for the plan's")


class Samples(NamedTuple):
    """What is to be planned, an element for each sample.

    Attributes:
        num_tokens: int64.
        data_set: number of its data set, int64.
        is_image: bool.
        is_held_out: bool; those are in no plan.
    """

    num_tokens: NDArray[np.int64]
    data_set: NDArray[np.int64]
    is_image: NDArray[np.bool]
    is_held_out: NDArray[np.bool]

    @classmethod
    def of(cls, num_tokens: Sequence[int]) -> Samples:
        """Videos of one data set."""
        count = len(num_tokens)
        no = np.zeros(count, bool)
        return cls(np.asarray(num_tokens, np.int64), np.zeros(count, np.int64), is_image=no, is_held_out=no)

    def held_out(self) -> tuple[NDArray[np.int64], Samples]:
        """The held-out samples, to be planned on their own: their places among all, and themselves."""
        places = np.flatnonzero(self.is_held_out)
        own = Samples(
            self.num_tokens[places], self.data_set[places], self.is_image[places], np.zeros(len(places), bool)
        )
        return places, own


class Mixture:
    """The samples of each epoch of a stage.

    Each data set's images and its videos are endless sequences, one shuffle of all of them after the other. An epoch
    takes the next so many of each sequence.

    Args:
        samples: of all data sets.
        kept: bool, which of them may be taken.
        stage: how often.
        seed: of the shuffles.

    Raises:
        ValueError: `repeats` for another number of data sets, a stage without samples, or a share of images of nothing.
    """

    def __init__(self, samples: Samples, kept: NDArray[np.bool], stage: StageConfig, seed: int) -> None:
        if not len(samples.num_tokens):
            raise ValueError("no samples to plan: the data set is empty")
        num_sets = int(samples.data_set.max()) + 1
        if stage.repeats and len(stage.repeats) != num_sets:
            sets = f"{num_sets} data set{'s' * (num_sets > 1)}"
            raise ValueError(f"repeats={stage.repeats}: there are {sets}, and {len(stage.repeats)} numbers")
        self._seed, self._first_step = seed, stage.first_step
        self._pools: list[tuple[NDArray[np.int64], float]] = []
        for number in range(num_sets):
            for is_image in (False, True):
                places = np.flatnonzero(kept & (samples.data_set == number) & (samples.is_image == is_image))
                self._pools.append((places, stage.repeats[number] if stage.repeats else 1.0))
        if stage.image_fraction is not None:
            self._pools = _with_images(self._pools, stage.image_fraction)
        if sum(len(places) * repeats for places, repeats in self._pools) < 1:
            raise ValueError(f"stage from step {stage.first_step}: an epoch has no sample; see repeats, image_fraction")

    def epoch(self, epoch: int) -> list[int]:
        """Places of an epoch's samples, in order."""
        taken = [self._take(number, epoch) for number in range(len(self._pools))]
        places = np.concatenate(taken)
        return places[keyed_random(self._seed, self._first_step, epoch).permutation(len(places))].tolist()

    def _take(self, number: int, epoch: int) -> NDArray[np.int64]:
        """What an epoch has of a pool."""
        places, repeats = self._pools[number]
        size = len(places)
        first, last = (math.floor(count * repeats * size) for count in (epoch, epoch + 1))
        parts = [places[:0]]
        for round_ in range(first // size, -(-last // size)) if size else ():
            order = keyed_random(self._seed, self._first_step, number, round_).permutation(size)
            parts.append(places[order[max(first - round_ * size, 0) : last - round_ * size]])
        return np.concatenate(parts)


def _with_images(
    pools: list[tuple[NDArray[np.int64], float]], fraction: float
) -> list[tuple[NDArray[np.int64], float]]:
    """Pools of videos and images in turn, the images as often as makes their share."""
    videos, images = (sum(len(places) * repeats for places, repeats in pools[kind::2]) for kind in (0, 1))
    if (fraction and not images) or (fraction < 1 and not videos):
        raise ValueError(f"image_fraction={fraction}: there are {videos:g} videos and {images:g} images to take")
    factors = (0.0, 1.0) if fraction == 1 else (1.0, fraction / (1 - fraction) * videos / max(1, images))
    return [(places, repeats * factors[place % 2]) for place, (places, repeats) in enumerate(pools)]


def keyed_random(*key: int) -> np.random.Generator:
    """Random numbers that are the same for the same key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
