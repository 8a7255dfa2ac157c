"""Which noise levels the sampling of one video visits: by its size, and by where it starts."""

from __future__ import annotations

import torch
from torch import Tensor

from video_dit.diffusion.schedules import RectifiedFlow, Schedule

NUM_HALVINGS = 60  # of an interval of times, down to float64's resolution


def of_size(schedule: Schedule, num_tokens: int) -> Schedule:
    """The schedule for a video of so many tokens; only a flow's depends on it."""
    return schedule.of_size(num_tokens) if isinstance(schedule, RectifiedFlow) else schedule


def sigmas_from(schedule: Schedule, sigma: float, num_steps: int) -> Tensor:
    """num_steps + 1 noise levels from `sigma` down to 0 at even steps of the schedule's time, float64."""
    time = time_at(schedule, sigma)
    return schedule.sigma_at(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * time)


def time_at(schedule: Schedule, sigma: float) -> float:
    """The time of a noise level, the inverse of `sigma_at`; 1 for levels above the highest."""
    low, high = 0.0, 1.0
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        if schedule.sigma_at(torch.tensor(middle, dtype=torch.float64)) < sigma:
            low = middle
        else:
            high = middle
    return high
