"""Reasons to save a training run now: somebody stops it, or a machine is to go away."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import ray.train
import torch

from video_dit.parallel.world import DistributedWorld

LOOK_EVERY_S = 2.0


class Asked(NamedTuple):
    """What came up during a step."""

    save: bool  # a checkpoint now: a machine is to go away
    stop: bool  # and then return


class Interruptions:
    """Looks, every few seconds, whether the run is to be stopped or a machine to go away; all processes agree.

    Args:
        stop_file: is there when the run is to be stopped.
        world: the processes.
    """

    def __init__(self, stop_file: Path, world: DistributedWorld) -> None:
        self._stop_file, self._world = stop_file, world
        self._looked_s = time.monotonic()
        self._deadline_ms: int | None = None  # of the machine that a checkpoint was saved for

    def look(self) -> Asked:
        """Every process calls it after every step."""
        is_time = self._world.rank == 0 and time.monotonic() - self._looked_s > LOOK_EVERY_S
        told = torch.tensor([float(is_time), float(is_time and self._stop_file.exists())])
        looks, stops = self._world.sum(told).tolist()
        if not looks:
            return Asked(save=False, stop=False)
        self._looked_s = time.monotonic()
        info = ray.train.get_preemption_info()  # all processes wait for each other in it
        is_new = info is not None and info.deadline_ms != self._deadline_ms
        self._deadline_ms = info.deadline_ms if info else None
        return Asked(save=is_new, stop=stops > 0)
