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

    They look after the same steps without a word between: each time, rank 0 says how many steps fit in until the next.

    Args:
        stop_file: is there when the run is to be stopped.
        world: the processes.
    """

    def __init__(self, stop_file: Path, world: DistributedWorld) -> None:
        self._stop_file, self._world = stop_file, world
        self._looked_s = time.monotonic()
        self._num_steps, self._interval = 0, 1  # since the last look, and until the next
        self._deadline_ms: int | None = None  # of the machine that a checkpoint was saved for

    def look(self) -> Asked:
        """Every process calls it after every step."""
        self._num_steps += 1
        if self._num_steps < self._interval:
            return Asked(save=False, stop=False)
        is_stopped = self._agree()
        info = ray.train.get_preemption_info()  # all processes wait for each other in it
        is_new = info is not None and info.deadline_ms != self._deadline_ms
        self._deadline_ms = info.deadline_ms if info else None
        return Asked(save=is_new, stop=is_stopped)

    def _agree(self) -> bool:
        """Whether the run is to be stopped; sets when to look next."""
        now_s = time.monotonic()
        steps_per_s = self._num_steps / max(now_s - self._looked_s, 1e-3)
        told = torch.zeros(2)
        if self._world.rank == 0:
            told = torch.tensor([max(1.0, LOOK_EVERY_S * steps_per_s // 1), float(self._stop_file.exists())])
        interval, is_stopped = self._world.sum(told).tolist()
        self._looked_s, self._num_steps, self._interval = now_s, 0, int(interval)
        return is_stopped > 0
