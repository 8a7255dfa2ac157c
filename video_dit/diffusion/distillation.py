"""Adversarial diffusion distillation in latent space (ADD, arXiv 2311.17042; LADD, arXiv 2403.12015).

A student predicts data from one of a few noise levels in one evaluation. What it predicts is noised again, and a
frozen teacher looks at it: its guided estimate of the data pulls the student towards it, and heads on its features tell
the student's samples from real ones. A student is sampled by `sampling.sample` without guidance, like any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from video_dit.diffusion.guidance import classifier_free
from video_dit.diffusion.losses import DiffusionConfig, logit_normal
from video_dit.diffusion.schedules import Level, Schedule
from video_dit.diffusion.targets import Target, estimate
from video_dit.discriminator import (
    FeatureHeads,
    hinge_discriminator,
    hinge_generator,
    r1_penalty,
    record_features,
)
from video_dit.model import VideoDiT
from video_dit.muon import Matrix
from video_dit.packing import PackedBatch, pack, patchify
from video_dit.random import keyed_normal, keyed_uniform
from video_dit.shapes import Stride


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a student learns from its teacher and from real samples.

    Attributes:
        num_steps: noise levels that the student denoises from, the schedule's even steps; it can be sampled in as many
            steps, and in any number that divides them.
        guidance_scale: of the teacher; the student is then sampled without guidance.
        distillation_weight: of the distance to the teacher's estimate, beside the adversarial loss (ADD's lambda).
        adversarial_weight: of that loss; 0 is distillation alone.
        r1_weight: of the penalty on the heads' gradients; half of it multiplies their squared norm.
        renoise_mean, renoise_std: of the logit-normal time at which the teacher looks, see `logit_normal`. Late, noisy
            times teach what the sample is as a whole, early ones its details, which heads tell from real ones sooner.
        feature_blocks: of the teacher, whose outputs the heads see; empty for all.
        head_dim: hidden width of the heads.
    """

    num_steps: int = 4
    guidance_scale: float = 2.0
    distillation_weight: float = 2.5
    adversarial_weight: float = 1.0
    r1_weight: float = 0.1
    renoise_mean: float = 0.0
    renoise_std: float = 1.0
    feature_blocks: tuple[int, ...] = ()
    head_dim: int = 64

    def __post_init__(self) -> None:
        for name in ("num_steps", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("guidance_scale", "distillation_weight", "adversarial_weight", "r1_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.renoise_std <= 0:
            raise ValueError(f"renoise_std={self.renoise_std}: must be positive")

    def blocks_of(self, num_blocks: int) -> tuple[int, ...]:
        """The feature blocks of a teacher; ValueError for one that it does not have."""
        if not set(self.feature_blocks) <= set(range(num_blocks)):
            raise ValueError(f"feature_blocks={self.feature_blocks}: the teacher has blocks 0 to {num_blocks - 1}")
        return self.feature_blocks or tuple(range(num_blocks))


class DistillationBatch(NamedTuple):
    """Packs of the same samples in the same order, and what belongs to each of their tokens.

    Attributes:
        packed: the student's input, data and noise at one of its levels.
        sigma: that level, n 1, float64.
        data: the samples, n (c pt ph pw).
        noise: a pack of the noise that is added before the teacher looks; its timesteps tell how much.
        noise_sigma: the same as noise levels, n 1, float64.
        unconditional: as `noise`, with the empty caption.
    """

    packed: PackedBatch
    sigma: Tensor
    data: Tensor
    noise: PackedBatch
    noise_sigma: Tensor
    unconditional: PackedBatch

    def to(self, device: torch.device | str) -> DistillationBatch:
        """The same batch on another device."""
        return self._replace(**{name: value.to(device) for name, value in self._asdict().items()})


def distillation_batch(
    latents: Sequence[Tensor],
    texts: Sequence[Tensor],
    empty_text: Tensor,
    keys: Sequence[tuple[int | str, ...]],
    config: DistillationConfig,
    schedule: Schedule,
    patch: Stride,
) -> DistillationBatch:
    """Noise samples and pack them; a function of its arguments, whoever calls it. See `losses.diffusion_batch`.

    Raises:
        ValueError: see `pack`.
    """
    levels = schedule.sigmas(config.num_steps)
    sigmas = [levels[int(keyed_uniform(*key, "level") * config.num_steps)] for key in keys]
    noise_sigmas = [_renoise_sigma(config, schedule, key) for key in keys]
    noisy = [
        schedule.mix(sample, keyed_normal(sample.shape, *key, "noise"), sigma)
        for sample, key, sigma in zip(latents, keys, sigmas, strict=True)
    ]
    noises = [keyed_normal(sample.shape, *key, "renoise") for sample, key in zip(latents, keys, strict=True)]
    packed = pack(noisy, [schedule.timestep(sigma) for sigma in sigmas], texts, patch)
    noise = pack(noises, [schedule.timestep(sigma) for sigma in noise_sigmas], texts, patch)
    return DistillationBatch(
        packed=packed,
        sigma=packed.per_token(torch.stack(sigmas)[:, None]),
        data=torch.cat([patchify(latents[place], patch) for place in packed.order]),
        noise=noise,
        noise_sigma=packed.per_token(torch.stack(noise_sigmas)[:, None]),
        unconditional=noise.with_texts([empty_text] * len(texts)),
    )


def _renoise_sigma(config: DistillationConfig, schedule: Schedule, key: tuple[int | str, ...]) -> Tensor:
    uniform = torch.tensor(keyed_uniform(*key, "renoise sigma"), dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    return schedule.sigma_at(logit_normal(uniform, config.renoise_mean, config.renoise_std))


def predict_data(model: nn.Module, packed: PackedBatch, level: Level, target: Target) -> Tensor:
    """A model's estimate of the data in one evaluation, n (c pt ph pw), float32: all that a student's step does."""
    return estimate(packed.tokens, model(packed).float(), target, level).data


def distillation_distance(generated: Tensor, teacher_data: Tensor, level: Level) -> Tensor:
    """c(t) |generated - teacher_data|^2 at each token, mean over its channels (ADD, eq. 4).

    c(t) = alpha, ADD's weighting: the more of the student's prediction is left after noise was added, the more the
    teacher's estimate says about it.

    Args:
        generated: the student's data, n (c pt ph pw).
        teacher_data: the teacher's estimate of it at `level`, a constant.
        level: n 1.
    """
    return level.alpha[:, 0].to(generated) * (generated - teacher_data.detach()).square().mean(dim=1)


class AdversarialDistillation(nn.Module):
    """Student, frozen teacher and the heads on its features; a forward pass computes all losses.

    Gradients of the student's losses reach the student alone, those of the discriminator's the heads alone.

    Args:
        student: the transformer to train, a copy of the teacher at first.
        teacher: is frozen here.
        config: of the losses.
        diffusion: schedule and target that both were trained with.
    """

    def __init__(
        self, student: VideoDiT, teacher: VideoDiT, config: DistillationConfig, diffusion: DiffusionConfig
    ) -> None:
        super().__init__()
        self.feature_blocks = config.blocks_of(len(teacher.blocks))
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.heads = FeatureHeads(teacher.config.dim, len(self.feature_blocks), config.head_dim)
        self.config, self.schedule, self.target = config, diffusion.schedule, diffusion.target

    @property
    def blocks(self) -> list[nn.Module]:
        """What is sharded block by block."""
        return [*self.student.blocks, *self.teacher.blocks]

    def hidden_matrices(self) -> list[Matrix]:
        """The student's, for Muon."""
        return self.student.hidden_matrices()

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted losses by name, each summed over tokens."""
        config, level = self.config, self.schedule.level(batch.noise_sigma)
        generated = predict_data(self.student, batch.packed, self.schedule.level(batch.sigma), self.target)
        noisy = level.mix(generated, batch.noise.tokens)
        prediction, fake = self._look(batch.noise, noisy)
        with torch.no_grad():
            _, real = self._look(batch.noise, level.mix(batch.data, batch.noise.tokens))
            guided = self._guide(prediction, batch.unconditional, noisy)
            teacher_data = estimate(noisy, guided, self.target, level).data
        discriminator, penalty = self._discriminator_losses(real, fake)
        losses = {
            "distillation": config.distillation_weight * distillation_distance(generated, teacher_data, level),
            "adversarial": config.adversarial_weight * hinge_generator(self._judge(fake)),
            "discriminator": discriminator,
            "r1": config.r1_weight / 2 * penalty,
        }
        return {name: loss.sum() for name, loss in losses.items()}

    def _look(self, packed: PackedBatch, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's prediction, n (c pt ph pw), and its features, n d each, of tokens at the pack's noise level."""
        with record_features(self.teacher.blocks[number] for number in self.feature_blocks) as features:
            prediction = self.teacher(packed.replace(tokens=tokens, timesteps=packed.timesteps)).float()
        return prediction, features

    def _guide(self, prediction: Tensor, unconditional: PackedBatch, tokens: Tensor) -> Tensor:
        """The teacher's prediction under classifier-free guidance."""
        scale = self.config.guidance_scale
        if scale == 1:
            return prediction
        return classifier_free(prediction, self._look(unconditional, tokens)[0], torch.as_tensor(scale))

    def _judge(self, features: Sequence[Tensor]) -> Tensor:
        """The heads' logits, n k, as a function of the features alone."""
        weights = {name: parameter.detach() for name, parameter in self.heads.named_parameters()}
        logits: Tensor = functional_call(self.heads, weights, (features,))
        return logits

    def _discriminator_losses(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Hinge loss and R1 penalty at each token, n each, as functions of the heads alone."""
        inputs = [features.detach().requires_grad_() for features in real]
        logits = self.heads(inputs)
        loss = hinge_discriminator(logits, self.heads([features.detach() for features in fake]))
        return loss, r1_penalty(logits, inputs)


def distillation_losses(model: nn.Module, batch: DistillationBatch) -> dict[str, Tensor]:
    """The losses of an `AdversarialDistillation`, for `train_step`."""
    losses: dict[str, Tensor] = model(batch.to(next(model.parameters()).device))
    return losses
