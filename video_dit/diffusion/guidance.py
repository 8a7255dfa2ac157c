"""Guidance: predictions made more like what was asked for, from one with and one without the condition.

The functions take packed tokens, n c, of many samples; where a norm or a mean over a sample is needed, `Samples` takes
it. `Guidance` applies to each sample of a pack what was asked for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from video_dit.diffusion.schedules import Level
from video_dit.diffusion.targets import Target, estimate, target_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Refinements of classifier-free guidance for one sample; the defaults are none.

    Attributes:
        interval: noise levels, sigma, between which there is guidance (arXiv 2404.07724).
        rescale: share of the way to the conditional prediction's standard deviation (arXiv 2305.08891, section 3.4).
        zero_star: first scale the unconditional prediction so that it fits the conditional one (CFG-Zero*, arXiv
            2503.18886).
        zero_above: noise level from which on a flow's velocity is taken as zero (zero-init of the same paper); 1 is the
            first step alone, more than 1 is never.
        parallel: share of the guidance along the conditional data that is kept (APG, arXiv 2410.02416); 1 is all.
        max_norm: of the guidance of a sample's data (APG); None is no limit.
        momentum: of the guidance over steps, negative in the paper (APG).
    """

    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    zero_star: bool = False
    zero_above: float = 2.0
    parallel: float = 1.0
    max_norm: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", tuple(self.interval))  # JSON has lists
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval={self.interval}: must be two noise levels between 0 and 1, the lower one first")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale}: must be between 0 (none) and 1")
        if self.max_norm is not None and self.max_norm <= 0:
            raise ValueError(f"max_norm={self.max_norm}: must be positive, or None for no limit")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be between -1 and 1")

    @property
    def is_projected(self) -> bool:
        """Whether APG changes anything."""
        return self.parallel != 1 or self.max_norm is not None or self.momentum != 0


class Samples:
    """Sums over the samples of a pack.

    Args:
        lengths: tokens of each sample, in the pack's order.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | None = None) -> None:
        self.lengths = torch.tensor(lengths, device=device)

    def spread(self, values: Tensor) -> Tensor:
        """b to n 1: each sample's number for each of its tokens."""
        return values.to(self.lengths.device).repeat_interleave(self.lengths)[:, None]

    def sum(self, tokens: Tensor) -> Tensor:
        """n c to n 1: the sum over all values of a token's sample, in float32 at least."""
        per_token = tokens.sum(dim=1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        return self.spread(torch.stack([part.sum() for part in per_token.split(self.lengths.tolist())]))

    def mean(self, tokens: Tensor) -> Tensor:
        """n c to n 1."""
        return self.sum(tokens) / self.spread(self.lengths * tokens.shape[1])

    def std(self, tokens: Tensor) -> Tensor:
        """n c to n 1: the standard deviation, without Bessel's correction."""
        return self.mean((tokens - self.mean(tokens)).square()).sqrt()


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): away from the unconditional prediction.

    `scale`, broadcast against the predictions: 1 is the conditional prediction itself, 0 the unconditional one.
    """
    return unconditional + scale * (conditional - unconditional)


def fitted(unconditional: Tensor, conditional: Tensor, samples: Samples) -> Tensor:
    """The multiple of a sample's unconditional prediction nearest to the conditional one (arXiv 2503.18886, eq. 7)."""
    square = samples.sum(unconditional.square())
    return samples.sum(conditional * unconditional) / square.clamp_min(1e-8) * unconditional


def rescaled(guided: Tensor, conditional: Tensor, share: Tensor, samples: Samples) -> Tensor:
    """Guidance's growth of a sample's standard deviation undone, by a share (arXiv 2305.08891, eq. 15 and 16)."""
    factor = samples.std(conditional) / samples.std(guided).clamp_min(1e-8)
    return guided * (share * factor + (1 - share))


def limited(difference: Tensor, max_norm: Tensor, samples: Samples) -> Tensor:
    """A sample's guidance cut to a norm (arXiv 2410.02416, eq. 7)."""
    norm = samples.sum(difference.square()).sqrt()
    return difference * (max_norm / norm.clamp_min(1e-8)).clamp_max(1)


def projected(difference: Tensor, conditional: Tensor, parallel: Tensor, samples: Samples) -> Tensor:
    """A sample's guidance with a share of what lies along its conditional data (arXiv 2410.02416, eq. 6)."""
    square = samples.sum(conditional.square()).clamp_min(1e-8)
    along = samples.sum(difference * conditional) / square * conditional
    return difference - (1 - parallel) * along


class Guidance:
    """What was asked for each sample of a pack. Holds APG's running guidance: one for each sampling.

    Args:
        scales: of classifier-free guidance, one a sample, in the pack's order.
        options: likewise.
        lengths: tokens of each sample, likewise.
        target: what the model predicts.
    """

    def __init__(
        self,
        scales: Sequence[float],
        options: Sequence[GuidanceOptions],
        lengths: Sequence[int],
        target: Target,
        device: torch.device | None = None,
    ) -> None:
        self.samples, self.target, self.options = Samples(lengths, device), target, options
        self.scales, self.scale = scales, self._spread(scales)
        low, high = zip(*(option.interval for option in options), strict=True)
        self.low, self.high = self._spread(low), self._spread(high)
        self.zero_above = self._spread([option.zero_above for option in options])
        self.running: Tensor | None = None
        # what no sample asks for costs nothing, which counts for small packs
        self._is_ever_needed = any(scale != 1 for scale in scales)
        self._is_everywhere = all(option.interval == (0.0, 1.0) for option in options)
        self._may_rest = any(option.zero_above <= 1 for option in options)
        self._is_plain = not any(option.zero_star or option.is_projected or option.rescale for option in options)

    def _spread(self, values: Sequence[float]) -> Tensor:
        return self.samples.spread(torch.tensor(values, dtype=torch.float32))

    def scale_at(self, sigma: Tensor) -> Tensor:
        """n 1: of classifier-free guidance at a noise level; 1 outside of a sample's interval."""
        if self._is_everywhere:
            return self.scale
        sigma = sigma.to(self.scale)
        return torch.where((self.low <= sigma) & (sigma <= self.high), self.scale, 1)

    def is_needed(self, sigma: Tensor) -> bool:
        """Whether any sample wants the unconditional prediction at a noise level."""
        if self._is_everywhere:
            return self._is_ever_needed
        return bool((self.scale_at(sigma) != 1).any())

    def __call__(self, x: Tensor, conditional: Tensor, unconditional: Tensor, level: Level) -> Tensor:
        """n c each, to the prediction to go on with, n c."""
        scale = self.scale_at(level.sigma)
        if self._is_plain:
            return classifier_free(conditional, unconditional, scale)
        if any(option.zero_star for option in self.options):
            is_fitted = self._spread([option.zero_star for option in self.options]) > 0
            unconditional = torch.where(is_fitted, fitted(unconditional, conditional, self.samples), unconditional)
        guided = classifier_free(conditional, unconditional, scale)
        if any(option.is_projected for option in self.options):
            is_projected = self._spread([option.is_projected for option in self.options]) > 0
            guided = torch.where(is_projected, self._project(x, conditional, unconditional, level, scale), guided)
        if any(option.rescale for option in self.options):
            share = self._spread([option.rescale for option in self.options])
            guided = torch.where(share > 0, rescaled(guided, conditional, share, self.samples), guided)
        return guided

    def start_from_rest(self, x: Tensor, prediction: Tensor, level: Level) -> Tensor:
        """The prediction of samples whose velocity is taken as zero at this level, n c: their x stays as it is."""
        if not self._may_rest:
            return prediction
        is_at_rest = level.sigma.to(self.zero_above) >= self.zero_above
        if not is_at_rest.any():
            return prediction
        still = target_of(x, x, self.target, level)  # on a flow, velocity 0
        return torch.where(is_at_rest, still, prediction)

    def _project(self, x: Tensor, conditional: Tensor, unconditional: Tensor, level: Level, scale: Tensor) -> Tensor:
        """Adaptive projected guidance (arXiv 2410.02416, algorithm 1), on the data."""
        data = estimate(x, conditional, self.target, level).data
        difference = data - estimate(x, unconditional, self.target, level).data
        if any(option.momentum for option in self.options):
            momentum = self._spread([option.momentum for option in self.options])
            self.running = difference if self.running is None else difference + momentum * self.running
            difference = self.running
        largest = [float("inf") if option.max_norm is None else option.max_norm for option in self.options]
        difference = limited(difference, self._spread(largest), self.samples)
        parallel = self._spread([option.parallel for option in self.options])
        guided = data + (scale - 1) * projected(difference, data, parallel, self.samples)
        return target_of(guided, (x - level.alpha.to(x) * guided) / level.sigma.to(x), self.target, level)
