"""What the VAE is trained on: reconstruction, its edges, divergence, a discriminator (arXiv 2012.09841, 2112.10752)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from video_dit.muon import Matrix
from video_dit.patch_discriminator import PatchDiscriminator, hinge_discriminator, r1_penalty
from video_dit.vae import VideoVAE

Perceptual = Callable[[Tensor, Tensor], Tensor]  # (video, reference), b 3 t h w each, to a mean distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeLossConfig:
    """Weights of the losses, each a mean over pixels and channels.

    Attributes:
        l2_weight, l1_weight: of the squared and the absolute error.
        gradient_weight: of the absolute error of differences between neighbours in time, height and width: edges, and
            how things move.
        perceptual_weight: of LPIPS, frame by frame.
        perceptual_file: its weights, a URL; see `video_dit.perceptual.Lpips`.
        kl_weight: of the divergence in nats per latent element.
        adversarial_weight: of the discriminator's verdict, relative to the reconstruction: its gradient at the
            reconstruction is scaled to that of the other errors (arXiv 2012.09841, eq. 7). 0 trains no discriminator.
        adversarial_start: step from which on there is a verdict.
        r1_weight: of the gradient penalty on real videos.
        discriminator_width, discriminator_layers: sizes.
    """

    l2_weight: float = 1.0
    l1_weight: float = 0.0
    gradient_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_file: str | None = None
    kl_weight: float = 1e-6
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    r1_weight: float = 0.1
    discriminator_width: int = 32
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name.endswith("_weight") and getattr(self, field.name) < 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: must not be negative")
        if not (self.l2_weight or self.l1_weight):
            raise ValueError("l2_weight=0, l1_weight=0: one of them must be positive")
        if self.perceptual_weight and self.perceptual_file is None:
            raise ValueError(f"perceptual_weight={self.perceptual_weight}: perceptual_file must name LPIPS's weights")


def gradient_distance(video: Tensor, reference: Tensor) -> Tensor:
    """Absolute error of the differences of neighbours along t, h and w, mean over all of them; b c t h w each."""
    error = video - reference
    parts = [error.diff(dim=dim) for dim in (2, 3, 4)]
    return torch.cat([part.abs().flatten() for part in parts]).mean()


def balance(reconstruction_loss: Tensor, adversarial_loss: Tensor, reconstruction: Tensor) -> Tensor:
    """The factor that gives both losses' gradients at the reconstruction the same norm; a constant, at most 1e4."""
    norms = [
        torch.autograd.grad(loss, reconstruction, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / norms[1].clamp_min(1e-8)).clamp_max(1e4).detach()


class AdversarialVae(nn.Module):
    """A VAE and the discriminator that it is trained against; a forward pass computes all losses.

    Gradients of the VAE's losses reach the VAE alone, those of the discriminator's the discriminator alone.
    """

    def __init__(self, vae: VideoVAE, config: VaeLossConfig, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        self.perceptual = (perceptual,)  # in a tuple it is no submodule: it is not trained, nor saved
        self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)

    def hidden_matrices(self) -> list[Matrix]:
        """Those of the VAE."""
        return self.vae.hidden_matrices()

    def forward(
        self, video: Tensor, generator: torch.Generator, is_adversarial: bool, touch_all: bool = False
    ) -> dict[str, Tensor]:
        """The weighted losses by name, means over pixels and channels.

        Args:
            video: b 3 t h w in [-1, 1].
            generator: of the latents' noise.
            is_adversarial: whether the discriminator is heard, and trained.
            touch_all: see `VideoVAE`.
        """
        reconstruction, losses = reconstruction_losses(
            self.vae, video, generator, self.config, self.perceptual[0], touch_all
        )
        silent = video.new_zeros(())
        losses |= {"adversarial": silent, "discriminator": silent, "r1": silent}
        if not is_adversarial:
            return losses
        errors = torch.stack([value for name, value in losses.items() if name != "kl"]).sum()
        verdict = -self._judge(reconstruction).mean()
        losses["adversarial"] = self.config.adversarial_weight * balance(errors, verdict, reconstruction) * verdict
        real = video.detach().requires_grad_()
        logits = self.discriminator(real)
        losses["discriminator"] = hinge_discriminator(logits, self.discriminator(reconstruction.detach()))
        losses["r1"] = self.config.r1_weight / 2 * r1_penalty(logits, real)
        return losses

    def _judge(self, video: Tensor) -> Tensor:
        """Logits as a function of the video alone."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        logits: Tensor = functional_call(self.discriminator, frozen, (video,))
        return logits


def reconstruction_losses(
    vae: nn.Module,
    video: Tensor,
    generator: torch.Generator,
    config: VaeLossConfig,
    perceptual: Perceptual | None = None,
    touch_all: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A VAE's reconstruction of a video, b 3 t h w, and the weighted losses by name, means over pixels and channels."""
    reconstruction, posterior = vae(video, generator, touch_all)
    error = reconstruction - video
    losses = {
        "l2": config.l2_weight * error.square().mean(),
        "l1": config.l1_weight * error.abs().mean(),
        "gradient": config.gradient_weight * gradient_distance(reconstruction, video),
        "kl": config.kl_weight * posterior.kl().mean(),
    }
    if perceptual is not None:
        losses["perceptual"] = config.perceptual_weight * perceptual(reconstruction, video)
    return reconstruction, losses
