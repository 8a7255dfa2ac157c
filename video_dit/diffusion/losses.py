"""What a transformer is trained on: the target at random noise levels, for every token of a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from video_dit.diffusion.held import draw_held
from video_dit.diffusion.schedules import (
    CosineSchedule,
    Level,
    LinearBetaSchedule,
    RectifiedFlow,
    ScaledLinearSchedule,
    Schedule,
)
from video_dit.diffusion.targets import Target, check_target, target_of
from video_dit.packing import PackedBatch, pack
from video_dit.random import keyed_generator, keyed_normal, keyed_uniform
from video_dit.shapes import LatentShape, Stride, TokenGrid
from video_dit.train_step import Losses

BetaScheduleClass = type[LinearBetaSchedule] | type[ScaledLinearSchedule] | type[CosineSchedule]
BETA_SCHEDULES: dict[str, BetaScheduleClass] = {
    "linear": LinearBetaSchedule,
    "scaled_linear": ScaledLinearSchedule,
    "cosine": CosineSchedule,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """How data and noise are mixed, what is predicted, and how noise levels and conditions are drawn.

    Attributes:
        schedule_name: "flow" or one of BETA_SCHEDULES.
        shift, base_tokens: of the flow, in training and sampling; see RectifiedFlow.
        zero_terminal_snr: of the others; see BetaSchedule.
        target: what the model predicts.
        times: "uniform" over the schedule's time, or "logit_normal" (arXiv 2403.03206, section 3.1).
        logit_mean, logit_std: of the latter.
        min_snr_gamma: weights the squared error of the data by min(SNR, gamma) (arXiv 2303.09556), whatever the target;
            None weights that of the target by 1.
        caption_dropout: share of samples trained without their caption, for classifier-free guidance; 1 trains a model
            that knows no captions, for classifier guidance.
        condition_rate: share of videos with some of their frames given, as generation from images and videos has them;
            see `draw_held`.
        independent_rate: share of videos whose frames have noise levels independent of each other (diffusion forcing,
            arXiv 2407.01392).
    """

    schedule_name: Literal["flow", "linear", "scaled_linear", "cosine"] = "flow"
    shift: float = 1.0
    base_tokens: int | None = None
    zero_terminal_snr: bool = False
    target: Target = "velocity"
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    caption_dropout: float = 0.1
    condition_rate: float = 0.0
    independent_rate: float = 0.0

    def __post_init__(self) -> None:
        check_target(self.target)
        for name in ("caption_dropout", "condition_rate", "independent_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std={self.logit_std}: must be positive")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma={self.min_snr_gamma}: must be positive, or None")
        if self.target == "noise" and self.schedule.alpha(self.schedule.sigmas(1)[0]) == 0:
            raise ValueError(
                f"target='noise': schedule_name={self.schedule_name!r} reaches pure noise, from which no data follows; "
                "use v or velocity"
            )

    @property
    def schedule(self) -> Schedule:
        """The paths from noise to data."""
        if self.schedule_name == "flow":
            return RectifiedFlow(shift=self.shift, base_tokens=self.base_tokens)
        return BETA_SCHEDULES[self.schedule_name](zero_terminal_snr=self.zero_terminal_snr)


class DiffusionBatch(NamedTuple):
    """A pack of noisy samples, and for each token the target, n (c pt ph pw), the loss's weight and noise level, n."""

    packed: PackedBatch
    target: Tensor
    weight: Tensor
    sigma: Tensor

    def shard(self, rank: int, size: int) -> DiffusionBatch:
        """One of `size` runs of tokens, for context parallelism; the losses of all runs add up to the pack's."""
        packed = self.packed.shard(rank, size)
        return DiffusionBatch(packed, *(value[packed.places] for value in self[1:]))


def diffusion_batch(
    latents: Sequence[Tensor],
    texts: Sequence[Tensor],
    empty_text: Tensor,
    keys: Sequence[tuple[int | str, ...]],
    config: DiffusionConfig,
    patch: Stride,
) -> DiffusionBatch:
    """Noise samples and pack them; a function of its arguments, whoever calls it.

    Args:
        latents: (c, t, h, w) each.
        texts: (s, d) each.
        empty_text: (s, d) of the empty caption.
        keys: one a sample, such as (seed, step, clip id): names its random numbers.
        config: distributions.
        patch: of the tokens.
    """
    schedule = config.schedule
    noisy, targets, sigmas, given = [], [], [], []
    for sample, text, key in zip(latents, texts, keys, strict=True):
        noise = keyed_normal(sample.shape, *key, "noise")
        sigma = draw_sigmas(config, LatentShape(*sample.shape[1:]).grid(patch), key)  # t/pt
        level = schedule.level(sigma.repeat_interleave(patch.t)[:, None, None])  # t 1 1
        noisy.append(level.mix(sample, noise))
        targets.append(target_of(sample, noise, config.target, level))
        sigmas.append(sigma)
        given.append(empty_text if keyed_uniform(*key, "caption") < config.caption_dropout else text)
    timesteps = [schedule.timestep(sigma).float() for sigma in sigmas]
    packed = pack(noisy, timesteps, given, patch)
    target = pack(targets, timesteps, given, patch).tokens  # the same order: grids and texts are the same
    of_token = torch.cat([sigmas[place] for place in packed.order])[packed.frame_of_token]  # n
    return DiffusionBatch(packed, target, loss_weight(schedule.level(of_token), config).float(), of_token.float())


def draw_sigmas(config: DiffusionConfig, grid: TokenGrid, key: tuple[int | str, ...]) -> Tensor:
    """Noise levels of a sample's frames of tokens, t/pt, float64; 0 for given ones, which images never are."""
    is_video = grid.t > 1
    is_independent = is_video and keyed_uniform(*key, "independent") < config.independent_rate
    is_conditioned = is_video and keyed_uniform(*key, "condition") < config.condition_rate
    uniform = torch.rand(grid.t if is_independent else 1, generator=keyed_generator(*key, "sigma")).double()
    time = uniform.clamp(1e-6, 1 - 1e-6)
    if config.times == "logit_normal":
        time = logit_normal(time, config.logit_mean, config.logit_std)
    sigma = config.schedule.of_size(grid.num_tokens).sigma_at(time).expand(grid.t)
    return torch.minimum(sigma, draw_held(grid.t, key)) if is_conditioned else sigma


def logit_normal(uniform: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times whose logit is normal (arXiv 2403.03206, section 3.1), by the inverse of the normal's distribution.

    Args:
        uniform: numbers in (0, 1): stratified ones give stratified times.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


def loss_weight(level: Level, config: DiffusionConfig) -> Tensor:
    """Weight of the target's squared error: an error e of the data is one of `factor` e there; 0 for given data."""
    alpha, sigma = level
    if config.min_snr_gamma is None:
        return (sigma > 0).to(sigma)
    factor = {
        "noise": alpha / sigma,
        "data": torch.ones_like(sigma),
        "v": (alpha**2 + sigma**2) / sigma,
        "velocity": (alpha + sigma) / sigma,
    }[config.target]
    weight = (alpha / sigma).square().clamp_max(config.min_snr_gamma) / factor.square()
    return weight.masked_fill(sigma == 0, 0)


def diffusion_loss(model: nn.Module, batch: DiffusionBatch) -> Tensor:
    """Weighted squared error of the target, mean over a token's channels, summed over tokens."""
    return diffusion_losses(model, batch).trained["loss"]


def diffusion_losses(model: nn.Module, batch: DiffusionBatch) -> Losses:
    """`diffusion_loss`, and for the log the unweighted errors by noise level."""
    errors = token_errors(model, batch)
    trained = (errors * batch.weight.to(errors.device)).sum()
    return Losses({"loss": trained}, loss_by_noise_level(errors.detach(), batch.sigma))


def token_errors(model: nn.Module, batch: DiffusionBatch) -> Tensor:
    """Squared error of the target at each token, n, mean over its channels."""
    device = next(model.parameters()).device
    prediction = model(batch.packed.to(device))
    return (prediction.float() - batch.target.to(device, non_blocking=device.type == "cuda")).square().mean(dim=1)


def loss_by_noise_level(errors: Tensor, sigma: Tensor, num_buckets: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    """Errors by noise level, for a log: sum and count of each bucket, which add up over packs and processes.

    Args:
        errors: of tokens, n; see `token_errors`.
        sigma: their noise levels, n; tokens of given frames, at 0, are left out.
        num_buckets: equal parts of (0, 1].

    Returns:
        by name, such as "sigma_0.2_0.4" for levels above 0.2 up to 0.4: scalars, float64.
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets={num_buckets}: must be at least 1")
    bucket = (sigma.to(errors.device) * num_buckets).ceil() - 1  # -1 for given frames
    return {
        f"sigma_{place / num_buckets:g}_{(place + 1) / num_buckets:g}": (
            errors.double()[bucket == place].sum(),
            (bucket == place).sum().double(),
        )
        for place in range(num_buckets)
    }
