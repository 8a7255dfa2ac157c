"""Noise levels by size and from a level on."""

import pytest
import torch

from video_dit.diffusion.levels import of_size, sigmas_from, time_at
from video_dit.diffusion.schedules import CosineSchedule, LinearBetaSchedule, RectifiedFlow

SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), LinearBetaSchedule(), CosineSchedule()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9])
def test_levels_begin_where_asked_and_are_even_in_time(schedule, sigma):
    levels = sigmas_from(schedule, sigma, 4)
    assert levels[0].item() == pytest.approx(sigma, abs=1e-12)
    assert levels[-1] == 0
    times = [time_at(schedule, level.item()) for level in levels]
    assert times == pytest.approx([times[0] * share for share in (1, 0.75, 0.5, 0.25, 0)], abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_from_pure_noise_they_are_the_schedules_own(schedule):
    assert torch.equal(sigmas_from(schedule, 1.0, 5), schedule.sigmas(5))


def test_the_size_matters_to_flows_that_say_so():
    flow = RectifiedFlow(shift=3.0, base_tokens=100)
    assert of_size(flow, 400) == RectifiedFlow(shift=6.0)
    assert of_size(LinearBetaSchedule(), 400) == LinearBetaSchedule()
