"""`sample`: one call for every sampler, schedule and target."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from video_dit.diffusion.samplers import SAMPLERS, FreshNoise, Sampling
from video_dit.diffusion.schedules import Level, Schedule
from video_dit.diffusion.targets import Target, check_target, estimate

Denoise = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]
DrawNoise = Callable[[int], Tensor]


def sample(
    denoise: Denoise,
    noise: Tensor,
    *,
    schedule: Schedule,
    target: Target = "velocity",
    sampler: str = "euler",
    num_steps: int | None = None,
    sigmas: Tensor | None = None,
    eta: float = 0.0,
    draw_noise: DrawNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Turn noise into data.

    Args:
        denoise: (x, timestep in [0, 1000]) -> the model's raw prediction, in the layout of x.
        noise: any shape; elementwise, so packed tokens do as well as latents. Where `sigmas` starts below 1, data with
            that much noise in it.
        schedule: how data and noise are mixed.
        target: what the model predicts.
        sampler: a name in SAMPLERS.
        num_steps: from the schedule's highest noise level to 0; 20 by default.
        sigmas: noise levels instead, decreasing, the last one 0: one number a level, or for each level numbers that
            broadcast against x, such as one a token.
        eta: share of a DDPM step's noise that "ddim" draws anew.
        draw_noise: step 0, 1, ... -> normal noise in the layout of x, for "ddpm" and for eta > 0. Noise keyed by the
            step (`video_dit.random`) makes the result independent of what else is sampled.
        on_step: called with (done, total) after each step; what it raises ends the sampling.

    Raises:
        ValueError: an unknown sampler or target, wrong noise levels, or noise that is needed and not given.
    """
    check_target(target)
    levels = [schedule.level(sigma) for sigma in noise_levels(schedule, num_steps, sigmas)]
    process = start(sampler, noise, levels, eta, draw_noise)
    total = len(levels) - 1
    query = next(process)
    while True:
        timestep = schedule.timestep(query.level.sigma)
        prediction = denoise(query.x, timestep)
        try:
            following = process.send(estimate(query.x, prediction, target, query.level))
        except StopIteration as end:
            if on_step:
                on_step(total, total)
            x: Tensor = end.value
            return x
        if on_step and following.step > query.step:
            on_step(following.step, total)
        query = following


def noise_levels(schedule: Schedule, num_steps: int | None, sigmas: Tensor | None) -> Tensor:
    """The levels that sampling visits, float64; see `sample`."""
    if sigmas is None:
        return schedule.sigmas(20 if num_steps is None else num_steps)
    if num_steps is not None:
        raise ValueError(f"num_steps={num_steps}: must be None where sigmas are given")
    if len(sigmas) < 2 or not (sigmas[:-1] > sigmas[1:]).all() or sigmas[-1].any() or (sigmas > 1).any():
        raise ValueError(f"sigmas={sigmas.tolist()}: must decrease, from at most 1 to 0, in at least one step")
    return sigmas.double()


def start(
    sampler: str, x: Tensor, levels: list[Level], eta: float = 0.0, draw_noise: DrawNoise | None = None
) -> Sampling:
    """A sampler at its beginning, to be driven by `next` and `send`; see `sample`."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}: known are {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must be between 0 (no fresh noise) and 1 (as much as DDPM)")
    if eta and sampler != "ddim":
        raise ValueError(f"eta={eta}: only sampler 'ddim' takes it, not {sampler!r}")
    if draw_noise is None and (eta or sampler == "ddpm"):
        raise ValueError(f"draw_noise=None: sampler {sampler!r} with eta={eta} adds noise in each step: give it some")
    return SAMPLERS[sampler](x, levels, FreshNoise(eta, draw_noise or _no_noise))


def _no_noise(step: int) -> Tensor:
    raise AssertionError(f"step {step}: a deterministic sampler draws nothing")
