"""How data and noise are mixed. One convention, written here once: sigma in [0, 1], 1 = pure noise, 0 = data."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

NUM_TRAIN_STEPS = 1000.0  # the model's time input is timestep = 1000 * sigma


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """Straight paths from noise to data (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206).

        x = (1 - sigma) * data + sigma * noise          velocity = dx/dsigma = noise - data

    Attributes:
        shift: moves sampling (and training) towards high noise, as long or large videos need:
            sigma -> shift * sigma / (1 + (shift - 1) * sigma), eq. 23 of arXiv 2403.03206.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}: must be positive; 1 leaves the noise levels as they are")

    def shifted(self, sigma: Tensor) -> Tensor:
        """Apply the shift to noise levels; keeps 0 and 1 in place."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def sigmas(self, num_steps: int) -> Tensor:
        """num_steps + 1 noise levels from 1 down to 0, float64.

        Raises:
            ValueError: num_steps is less than 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: must be at least 1")
        return self.shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))

    def mix(self, data: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """The point on the path at noise level sigma (broadcast against the data)."""
        return (1 - sigma) * data + sigma * noise

    def velocity(self, data: Tensor, noise: Tensor) -> Tensor:
        """The derivative of `mix` by sigma: what the model learns to predict."""
        return noise - data

    def timestep(self, sigma: Tensor | float) -> Tensor | float:
        """The model's time input, in [0, 1000]."""
        return sigma * NUM_TRAIN_STEPS


def logit_normal(uniform: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Noise levels whose logit is normal (arXiv 2403.03206, section 3.1), by the inverse of the normal's distribution.

    Args:
        uniform: numbers in (0, 1): stratified ones give stratified noise levels.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))
