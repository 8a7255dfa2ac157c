"""Classifier guidance (ADM, arXiv 2105.05233, section 4): a classifier of noisy x leads a diffusion model to a class.

By Bayes' rule the score of x given y is that of x plus the gradient of log p(y | x) by x, and a noise estimate is the
score times -sigma, so, with a scale on the gradient (eq. 14 of the paper, for any schedule),

    noise' = noise - scale * sigma * gradient        data' = data + scale * sigma^2 / alpha * gradient

since both must still mix to x. At scale 1 with the exact gradient, unconditional becomes conditional sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from video_dit.diffusion.sampling import Denoise
from video_dit.diffusion.schedules import Level, Schedule
from video_dit.diffusion.targets import Estimate, Target, check_target, target_of

LogProb = Callable[[Tensor, Tensor], Tensor]


def guided_estimate(estimate: Estimate, gradient: Tensor, level: Level, scale: float) -> Estimate:
    """An estimate made more like the class.

    Args:
        estimate: data and noise that x is believed to be mixed from.
        gradient: of log p(y | x) by x, in the layout of x.
        level: of x; where it holds no data it tells of no class, and the estimate stays as it is.
        scale: 1 is Bayes' rule; more trades variety for likeness.
    """
    change = _change(gradient, level, scale)
    return Estimate(estimate.data + change.data, estimate.noise + change.noise)


def with_classifier(denoise: Denoise, log_prob: LogProb, schedule: Schedule, target: Target, scale: float) -> Denoise:
    """`denoise` under classifier guidance, for `sample`: the model's raw prediction in and out.

    Works under `torch.no_grad` and in inference mode: there, `log_prob` is called outside of it, with copies of both
    arguments, because autograd refuses inference tensors. So it must not hold any itself (a model loaded, or a mask
    made, in inference mode).

    Args:
        denoise: (x, timestep in [0, 1000]) -> prediction, in the layout of x.
        log_prob: (x, timestep) -> log p(y | x), summed over samples that do not depend on each other: a scalar.
        schedule: how data and noise are mixed.
        target: what the model predicts.
        scale: see `guided_estimate`; at 0 the classifier is not asked.

    Raises:
        ValueError: an unknown target.
    """
    check_target(target)
    if scale == 0:
        return denoise

    def guided(x: Tensor, timestep: Tensor) -> Tensor:
        level = schedule.level(schedule.sigma_of(timestep))
        change = _change(_gradient(log_prob, x, timestep), level, scale)
        # every target is linear in data and noise, so it changes by the target of their changes
        return denoise(x, timestep) + target_of(change.data, change.noise, target, level)

    return guided


def _change(gradient: Tensor, level: Level, scale: float) -> Estimate:
    """What guidance adds to data and noise."""
    alpha, sigma = level.alpha.to(gradient), level.sigma.to(gradient)
    step = torch.where(alpha > 0, scale * sigma * gradient, 0)
    return Estimate(data=step * (sigma / alpha.clamp_min(torch.finfo(alpha.dtype).tiny)), noise=-step)


def _gradient(log_prob: LogProb, x: Tensor, timestep: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(point, timestep.clone()), point)
    return gradient
