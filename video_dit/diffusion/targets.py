"""What a model may predict, and how one prediction becomes any other.

    noise      n                              DDPM (arXiv 2006.11239)
    data       d
    v          alpha n - sigma d              Salimans and Ho (arXiv 2202.00512, section 4)
    velocity   n - d                          rectified flow (arXiv 2209.03003)

With x = alpha d + sigma n each of them fixes both d and n.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from video_dit.diffusion.schedules import Level

Target = Literal["noise", "data", "v", "velocity"]
TARGETS: tuple[Target, ...] = ("noise", "data", "v", "velocity")


class Estimate(NamedTuple):
    """What a model believes x was mixed from."""

    data: Tensor
    noise: Tensor


def check_target(target: str) -> None:
    """Raise ValueError for a name that is none of TARGETS."""
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: known are {', '.join(TARGETS)}")


def target_of(data: Tensor, noise: Tensor, target: Target, level: Level) -> Tensor:
    """What the model should predict at a level, for the data and the noise that x was mixed from."""
    if target == "noise":
        return noise
    if target == "data":
        return data
    if target == "v":
        return level.alpha.to(data) * noise - level.sigma.to(data) * data
    return noise - data


def estimate(x: Tensor, prediction: Tensor, target: Target, level: Level) -> Estimate:
    """Data and noise from a prediction.

    Raises:
        ValueError: noise predicted where x holds no data, or data where it holds no noise: the other is not determined.
    """
    alpha, sigma = level.alpha.to(x), level.sigma.to(x)
    if target == "noise":
        if not (alpha > 0).all():
            raise ValueError("target='noise': x is pure noise here, from which no data follows; use v or velocity")
        return Estimate((x - sigma * prediction) / alpha, prediction)
    if target == "data":
        if not (sigma > 0).all():
            raise ValueError("target='data': x is pure data here, from which no noise follows; end at this level")
        return Estimate(prediction, (x - alpha * prediction) / sigma)
    if target == "v":
        square = alpha**2 + sigma**2
        return Estimate((alpha * x - sigma * prediction) / square, (sigma * x + alpha * prediction) / square)
    total = alpha + sigma
    return Estimate((x - sigma * prediction) / total, (x + alpha * prediction) / total)
