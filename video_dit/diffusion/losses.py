"""What a transformer is trained on: the velocity at a random noise level, for every token of a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from video_dit.diffusion.schedules import RectifiedFlow, logit_normal
from video_dit.packing import PackedBatch, pack
from video_dit.random import keyed_normal, keyed_uniform
from video_dit.shapes import Stride


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How noise levels and conditions are drawn.

    Attributes:
        shift: of the schedule, in training and sampling.
        logit_mean, logit_std: of the noise level's logit (arXiv 2403.03206).
        caption_dropout: share of samples trained without their caption, for classifier-free guidance.
    """

    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout={self.caption_dropout}: must be in [0, 1)")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std={self.logit_std}: must be positive")

    @property
    def schedule(self) -> RectifiedFlow:
        """The paths from noise to data."""
        return RectifiedFlow(shift=self.shift)


class FlowBatch(NamedTuple):
    """A pack of noisy samples and the velocity at each token, n (c pt ph pw)."""

    packed: PackedBatch
    target: Tensor

    def shard(self, rank: int, size: int) -> FlowBatch:
        """One of `size` runs of tokens, for context parallelism; the losses of all runs add up to the pack's."""
        packed = self.packed.shard(rank, size)
        return FlowBatch(packed, self.target[packed.places])


def flow_batch(
    latents: Sequence[Tensor],
    texts: Sequence[Tensor],
    empty_text: Tensor,
    keys: Sequence[tuple[int | str, ...]],
    config: FlowConfig,
    patch: Stride,
) -> FlowBatch:
    """Noise samples and pack them; a function of its arguments, whoever calls it.

    Args:
        latents: (c, t, h, w) each.
        texts: (s, d) each.
        empty_text: (s, d) of the empty caption.
        keys: one a sample, such as (seed, step, clip id): names its random numbers.
        config: distributions.
        patch: of the tokens.
    """
    noisy, velocities, timesteps, given = [], [], [], []
    schedule = config.schedule
    for sample, text, key in zip(latents, texts, keys, strict=True):
        noise = keyed_normal(sample.shape, *key, "noise")
        uniform = torch.tensor(keyed_uniform(*key, "sigma"), dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        sigma = float(schedule.shifted(logit_normal(uniform, config.logit_mean, config.logit_std)))
        noisy.append(schedule.mix(sample, noise, sigma))
        velocities.append(schedule.velocity(sample, noise))
        timesteps.append(float(schedule.timestep(sigma)))
        given.append(empty_text if keyed_uniform(*key, "caption") < config.caption_dropout else text)
    target = pack(velocities, timesteps, given, patch).tokens  # the same order: grids and texts are the same
    return FlowBatch(pack(noisy, timesteps, given, patch), target)


def flow_loss(model: nn.Module, batch: FlowBatch) -> Tensor:
    """Squared error of the velocity, mean over a token's channels, summed over tokens."""
    device = next(model.parameters()).device
    prediction = model(batch.packed.to(device))
    return (prediction.float() - batch.target.to(device)).square().mean(dim=1).sum()
