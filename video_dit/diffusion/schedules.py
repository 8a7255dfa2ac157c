"""How data and noise are mixed. One convention, written here once: sigma in [0, 1], 1 = pure noise, 0 = data.

    x = alpha(sigma) * data + sigma * noise

A schedule says what alpha is, which noise levels sampling visits, and how a level is told to the model. Levels are
float64 tensors: one number for all of x, or one for each token, to broadcast against it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TRAIN_STEPS = 1000.0  # the model's time input, `timestep`, lies in [0, 1000]
NUM_HALVINGS = 60  # of an interval of times, down to float64's resolution


class Level(NamedTuple):
    """A noise level: the shares of data and of noise in x."""

    alpha: Tensor
    sigma: Tensor

    def mix(self, data: Tensor, noise: Tensor) -> Tensor:
        """The point x at this level, in the data's dtype."""
        return self.alpha.to(data) * data + self.sigma.to(data) * noise


class Schedule:
    """What all schedules share."""

    def alpha(self, sigma: Tensor) -> Tensor:
        """Share of the data at noise level sigma."""
        raise NotImplementedError

    def sigma_at(self, time: Tensor) -> Tensor:
        """Noise level at a time in [0, 1], 0 = data: even steps of time are this schedule's even steps."""
        raise NotImplementedError

    def timestep(self, sigma: Tensor) -> Tensor:
        """The model's time input, in [0, 1000]; 0 for data."""
        raise NotImplementedError

    def sigma_of(self, timestep: Tensor) -> Tensor:
        """The noise level that `timestep` tells of, float64."""
        raise NotImplementedError

    def of_size(self, num_tokens: int) -> Schedule:
        """The schedule for a video of so many tokens."""
        del num_tokens
        return self

    def sigmas(self, num_steps: int, start: float = 1.0) -> Tensor:
        """num_steps + 1 noise levels down to 0 at even steps of time, float64.

        Args:
            num_steps: at least 1.
            start: the first level; 1 is pure noise.

        Raises:
            ValueError: num_steps is less than 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: must be at least 1")
        return self.sigma_at(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * self.time_of(start))

    def time_of(self, sigma: float) -> float:
        """The time of a noise level, the inverse of `sigma_at`; 1 for levels above the highest."""
        low, high = 0.0, 1.0
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            if self.sigma_at(torch.tensor(middle, dtype=torch.float64)) < sigma:
                low = middle
            else:
                high = middle
        return high

    def level(self, sigma: Tensor | float) -> Level:
        """Both shares at noise level sigma, float64."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return Level(self.alpha(sigma), sigma)

    def mix(self, data: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """q(x | data) in closed form: the point at noise level sigma."""
        return self.level(sigma).mix(data, noise)

    def mix_further(self, x: Tensor, noise: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """q(x_next | x), from noise level sigma up to sigma_next: chained, it has the distribution of `mix`."""
        now, then = self.level(sigma), self.level(sigma_next)
        kept = then.alpha / now.alpha
        return kept.to(x) * x + (then.sigma**2 - (kept * now.sigma) ** 2).sqrt().to(x) * noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Schedule):
    """Straight paths from noise to data, alpha = 1 - sigma (arXiv 2209.03003, 2403.03206).

    Attributes:
        shift: moves sampling (and training) towards high noise, as long or large videos need:
            sigma -> shift * sigma / (1 + (shift - 1) * sigma), eq. 23 of arXiv 2403.03206.
        base_tokens: tokens of a video for which `shift` holds; others have shift * sqrt(tokens / base_tokens), the same
            equation. None: one shift for all.
    """

    shift: float = 1.0
    base_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}: must be positive; 1 leaves the noise levels as they are")
        if self.base_tokens is not None and self.base_tokens < 1:
            raise ValueError(f"base_tokens={self.base_tokens}: must be at least 1, or None for one shift for all sizes")

    def of_size(self, num_tokens: int) -> RectifiedFlow:
        """The schedule for a video of so many tokens."""
        if self.base_tokens is None:
            return self
        return RectifiedFlow(shift=self.shift * math.sqrt(num_tokens / self.base_tokens))

    def alpha(self, sigma: Tensor) -> Tensor:
        """1 - sigma."""
        return 1 - sigma

    def sigma_at(self, time: Tensor) -> Tensor:
        """Even steps, shifted; keeps 0 and 1 in place."""
        return self.shift * time / (1 + (self.shift - 1) * time)

    def timestep(self, sigma: Tensor) -> Tensor:
        """1000 sigma."""
        return sigma * NUM_TRAIN_STEPS

    def sigma_of(self, timestep: Tensor) -> Tensor:
        """timestep / 1000."""
        return timestep.double() / NUM_TRAIN_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class BetaSchedule(Schedule):
    """Diffusion in steps 0, 1, ...: alpha^2 + sigma^2 = 1 and alpha^2 = prod(1 - beta) (DDPM, arXiv 2006.11239, eq. 4).

    Attributes:
        num_train_steps: of the chain.
        zero_terminal_snr: alphas are moved so that the last step is pure noise (arXiv 2305.08891, algorithm 1); models
            trained so cannot predict the noise, but v.
    """

    num_train_steps: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.num_train_steps < 2:
            raise ValueError(f"num_train_steps={self.num_train_steps}: must be at least 2")

    def raw_betas(self) -> Tensor:
        """Variance added in each step, before any move to zero terminal SNR, float64."""
        raise NotImplementedError

    @functools.cached_property
    def alphas(self) -> Tensor:
        """alpha after each step, float64."""
        alphas = (1 - self.raw_betas()).cumprod(0).sqrt()
        if self.zero_terminal_snr:
            alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
        return alphas

    @functools.cached_property
    def step_sigmas(self) -> Tensor:
        """sigma after each step, float64: where diffusers' step k is this library's noise level."""
        return (1 - self.alphas**2).sqrt()

    def alpha(self, sigma: Tensor) -> Tensor:
        """sqrt(1 - sigma^2)."""
        return (1 - sigma**2).clamp_min(0).sqrt()

    def sigma_at(self, time: Tensor) -> Tensor:
        """Linear between the steps; the last step at 1, data at 0."""
        return _interpolate(time * self.num_train_steps, torch.arange(self.num_train_steps + 1.0), self._ladder)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The step, 0 ... 999, fractions between them; other lengths of the chain are scaled to that."""
        place = _interpolate(sigma, self._ladder, torch.arange(self.num_train_steps + 1.0))
        return (place - 1).clamp_min(0) * (NUM_TRAIN_STEPS / self.num_train_steps)

    def sigma_of(self, timestep: Tensor) -> Tensor:
        """The noise level after that step; the first one's for 0, which all levels below it share."""
        return self.sigma_at((timestep.double() * (self.num_train_steps / NUM_TRAIN_STEPS) + 1) / self.num_train_steps)

    @property
    def _ladder(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.float64), self.step_sigmas])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearBetaSchedule(BetaSchedule):
    """DDPM's betas, evenly spaced (arXiv 2006.11239, section 4)."""

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def raw_betas(self) -> Tensor:
        """From `beta_start` to `beta_end`."""
        return torch.linspace(self.beta_start, self.beta_end, self.num_train_steps, dtype=torch.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledLinearSchedule(BetaSchedule):
    """Latent diffusion's betas, their roots evenly spaced (arXiv 2112.10752)."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def raw_betas(self) -> Tensor:
        """From `beta_start` to `beta_end`."""
        start, end = self.beta_start**0.5, self.beta_end**0.5
        return torch.linspace(start, end, self.num_train_steps, dtype=torch.float64).square()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineSchedule(BetaSchedule):
    """alpha is a quarter of a cosine over time (arXiv 2102.09672, eq. 17).

    Attributes:
        offset: of time, so that the first steps are not too small.
        max_beta: above it betas are cut, before the end.
    """

    offset: float = 0.008
    max_beta: float = 0.999

    def raw_betas(self) -> Tensor:
        """1 minus the ratio of neighbours."""
        time = torch.linspace(0, 1, self.num_train_steps + 1, dtype=torch.float64)
        alphas_squared = torch.cos((time + self.offset) / (1 + self.offset) * (math.pi / 2)).square()
        return (1 - alphas_squared[1:] / alphas_squared[:-1]).clamp_max(self.max_beta)


def _interpolate(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of increasing places, constant beyond both ends."""
    places, values = places.to(x), values.to(x)
    right = torch.searchsorted(places, x.contiguous()).clamp(1, len(places) - 1)
    share = (x - places[right - 1]) / (places[right] - places[right - 1])
    return torch.lerp(values[right - 1], values[right], share.clamp(0, 1))
