"""Data with a known best denoiser: samples have its moments, and guidance moves them as the closed form says."""

import pytest
import torch

from video_dit.diffusion.guidance import classifier_free
from video_dit.diffusion.samplers import SAMPLERS
from video_dit.diffusion.sampling import sample
from video_dit.diffusion.schedules import CosineSchedule, LinearBetaSchedule, RectifiedFlow
from video_dit.diffusion.targets import target_of
from video_dit.random import keyed_normal

NUM_SAMPLES = 40_000
WEIGHTS, MEANS, STDS = torch.tensor([[0.3, 0.7], [-1.5, 1.0], [0.3, 0.5]], dtype=torch.float64)
SCHEDULES = {
    "flow": (RectifiedFlow(), "velocity"),
    "linear": (LinearBetaSchedule(), "noise"),
    "cosine": (CosineSchedule(), "v"),
}


def mixture_data(x, level, weights=WEIGHTS, means=MEANS, stds=STDS):
    """E[data | x], n, for data of a Gaussian mixture: each component's, weighted by how likely x is of it."""
    variances = (level.alpha * stds) ** 2 + level.sigma**2
    offsets = x[:, None] - level.alpha * means  # n k
    likely = torch.softmax(weights.log() - 0.5 * variances.log() - 0.5 * offsets**2 / variances, dim=1)
    return (likely * (means + level.alpha * stds**2 / variances * offsets)).sum(dim=1)


def denoiser(schedule, target, data):
    """(x, level) -> E[data | x] as a model that predicts `target`."""
    times = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:]
    sigmas = schedule.sigma_at(times)
    timesteps = schedule.timestep(sigmas)

    def denoise(x, timestep):
        level = schedule.level(sigmas[(timesteps - timestep).abs().argmin()])
        estimate = data(x, level)
        return target_of(estimate, (x - level.alpha * estimate) / level.sigma, target, level)

    return denoise


def drawn(sampler, schedule, denoise, target, num_steps=100):
    options = {} if sampler != "ddpm" else {"draw_noise": lambda step: keyed_normal((NUM_SAMPLES,), step).double()}
    noise = keyed_normal((NUM_SAMPLES,), "start").double()
    return sample(denoise, noise, schedule=schedule, target=target, sampler=sampler, num_steps=num_steps, **options)


def assert_moments(x, mean, variance, bias=0.0):
    """To four standard errors, and what a finite number of steps leaves."""
    count = len(x)
    assert abs(x.mean() - mean) <= 4 * (variance / count) ** 0.5 + bias, x.mean()
    fourth = ((x - x.mean()) ** 4).mean()
    assert abs(x.var() - variance) <= 4 * ((fourth - variance**2) / count) ** 0.5 + bias, x.var()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_the_datas_moments(sampler, name):
    schedule, target = SCHEDULES[name]
    x = drawn(sampler, schedule, denoiser(schedule, target, mixture_data), target)
    mean = (WEIGHTS * MEANS).sum()
    variance = (WEIGHTS * (STDS**2 + MEANS**2)).sum() - mean**2
    first_order = sampler in ("ddpm", "ddim", "euler")
    assert_moments(x, mean, variance, bias=0.04 if first_order else 0.01)
    low = x < -0.5  # between the components
    assert abs(low.double().mean() - WEIGHTS[0]) <= 0.015
    assert_moments(x[low], MEANS[0], STDS[0] ** 2, bias=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_classifier_free_guidance_moves_the_mean_by_its_scale(sampler, scale):
    """Of two Gaussians as wide as each other, guidance makes a third: mean m_u + scale (m_c - m_u), the same width."""
    schedule, target, std = RectifiedFlow(), "velocity", torch.tensor([0.4], dtype=torch.float64)

    def model(mean):
        parts = torch.ones(1, dtype=torch.float64), torch.tensor([mean], dtype=torch.float64), std
        return denoiser(schedule, target, lambda x, level: mixture_data(x, level, *parts))

    conditional, unconditional = model(1.0), model(-0.5)

    def guided(x, timestep):
        return classifier_free(conditional(x, timestep), unconditional(x, timestep), scale)

    assert_moments(drawn(sampler, schedule, guided, target), -0.5 + 1.5 * scale, 0.4**2, bias=0.02)
