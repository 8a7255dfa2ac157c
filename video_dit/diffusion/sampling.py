"""From noise to data: integrate the learned velocity along the schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from video_dit.diffusion.schedules import RectifiedFlow

Denoise = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, int], None]


def sample(
    denoise: Denoise,
    noise: Tensor,
    *,
    schedule: RectifiedFlow,
    sampler: str = "euler",
    num_steps: int = 20,
    on_step: OnStep | None = None,
) -> Tensor:
    """Turn noise into data.

    Args:
        denoise: (x, timestep in [0, 1000]) -> velocity, in the layout of x.
        noise: any shape; elementwise, so packed tokens do as well as latents.
        schedule: gives the noise levels.
        sampler: a name in SAMPLERS.
        num_steps: steps from sigma 1 to 0.
        on_step: called with (done, total) after each step; what it raises ends the sampling.

    Raises:
        ValueError: an unknown sampler, or num_steps < 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}: known are {', '.join(SAMPLERS)}")
    step = SAMPLERS[sampler]
    sigmas = schedule.sigmas(num_steps).tolist()
    x = noise
    for done, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas), start=1):
        x = step(denoise, x, sigma, sigma_next, schedule)
        if on_step:
            on_step(done, num_steps)
    return x


def euler_step(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, schedule: RectifiedFlow) -> Tensor:
    """First order: one evaluation a step."""
    return x + (sigma_next - sigma) * denoise(x, float(schedule.timestep(sigma)))


def heun_step(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, schedule: RectifiedFlow) -> Tensor:
    """Second order (Karras et al., arXiv 2206.00364, algorithm 1): the mean of the slopes at both ends."""
    slope = denoise(x, float(schedule.timestep(sigma)))
    ahead = x + (sigma_next - sigma) * slope
    if sigma_next == 0:  # the field is not defined at the data itself
        return ahead
    slope_ahead = denoise(ahead, float(schedule.timestep(sigma_next)))
    return x + (sigma_next - sigma) * (slope + slope_ahead) / 2


SAMPLERS = {"euler": euler_step, "heun": heun_step}


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): away from the unconditional prediction.

    `scale`, broadcast against the predictions: 1 is the conditional prediction itself, 0 the unconditional one.
    """
    return unconditional + scale * (conditional - unconditional)
