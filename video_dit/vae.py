"""VideoVAE: causal video autoencoder, whole or chunk by chunk with the same numbers.

The architecture and the names of the weights are those of Wan 2.1 (arXiv 2503.20314) and, with `is_residual` and pixel
patches, of Wan 2.2, as published in diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from video_dit.muon import Matrix
from video_dit.shapes import Stride, VideoShape
from video_dit.vae_config import VideoVAEConfig
from video_dit.vae_convs import CHANNELS_LAST, Cache, CausalConv3d, use_channels_last
from video_dit.vae_networks import Decoder, Encoder, Stages, initialize
from video_dit.vae_tiling import TiledNetwork, Tiling
from video_dit.weights import load_model, save_model

__all__ = ["Gaussian", "Tiling", "VideoVAE", "VideoVAEConfig", "split_latents"]


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A normal distribution of latents, independent in every element.

    Attributes:
        mean: b c t h w, normalised per channel.
        std: b c t h w, normalised per channel.
        raw_mean: b c t h w, as the encoder gives it; what the KL term needs.
        raw_logvar: b c t h w.
    """

    mean: Tensor
    std: Tensor
    raw_mean: Tensor
    raw_logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents drawn from it, b c t h w; the noise is drawn on the generator's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Divergence of the raw distribution from the unit normal, in nats per latent element: shape b."""
        nats = 0.5 * (self.raw_mean.square() + self.raw_logvar.exp() - 1 - self.raw_logvar)
        return nats.mean(dim=(1, 2, 3, 4))


class VideoVAE(nn.Module):
    """Video to normalised latents and back.

    `1 + stride.t * k` frames become `1 + k` latent frames; no output depends on later frames, and an image is a video
    of one frame. Video is `b 3 t h w` in [-1, 1].
    """

    published_class: ClassVar[str] = "AutoencoderKLWan"

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        decoder_widths = [config.decoder_dim * mult for mult in (*config.dim_mult, config.dim_mult[-1])][::-1]
        z_dim, is_temporal = config.z_dim, config.temperal_downsample
        form = (config.num_res_blocks, config.dropout, config.is_residual)
        self.encoder = Encoder(config.in_channels, 2 * z_dim, Stages(widths, is_temporal, *form))
        self.quant_conv = CausalConv3d(2 * z_dim, 2 * z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, (1, 1, 1))
        self.decoder = Decoder(z_dim, config.out_channels, Stages(decoder_widths, is_temporal[::-1], *form))
        initialize(self)
        if not self.quant_conv.weight.is_meta:
            self._narrow_posterior()

    def _narrow_posterior(self) -> None:
        """Start at a standard deviation of 0.05: unit noise would hide the latents for hundreds of steps."""
        with torch.no_grad():
            self.quant_conv.weight[self.config.z_dim :] *= 0.1
            self.quant_conv.get_parameter("bias")[self.config.z_dim :] = -6.0

    @classmethod
    def from_pretrained(cls, url: str, subfolder: str = "vae", dtype: torch.dtype | None = None) -> VideoVAE:
        """Load a diffusers folder from any fsspec URL or path; `dtype` None keeps the weights' own.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: config or weights do not fit.
        """
        return use_channels_last(load_model(cls, VideoVAEConfig, url, subfolder, dtype))

    def save_pretrained(self, url: str, subfolder: str = "vae") -> None:
        """Write a folder that diffusers' `AutoencoderKLWan` loads."""
        save_model(self, url, subfolder)

    def with_latent_statistics(self, mean: Sequence[float], std: Sequence[float]) -> VideoVAE:
        """Set, in place, the mean and standard deviation of each raw channel that latents are normalised by.

        Returns:
            itself.

        Raises:
            ValueError: not one value a channel, or a standard deviation that is not positive.
        """
        self.config = dataclasses.replace(self.config, latents_mean=tuple(mean), latents_std=tuple(std))
        return self

    def hidden_matrices(self) -> list[Matrix]:
        """Kernels between hidden layers: what Muon may train."""
        outer = {self.encoder.conv_in, self.encoder.conv_out, self.decoder.conv_in, self.decoder.conv_out}
        return [
            Matrix(module.get_parameter("weight"), 3 if name.endswith("to_qkv") else 1)
            for part in (self.encoder, self.decoder)
            for name, module in part.named_modules()
            if isinstance(module, nn.Conv2d | nn.Conv3d) and module not in outer
        ]

    def encode(self, video: Tensor) -> Gaussian:
        """The distribution of a video's latents: b 3 t h w to b z t' h' w'.

        Raises:
            ValueError: frames are not 1 + a multiple of the stride, or a side is not a multiple.
        """
        return self._encode(video, None)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """The video of normalised latents: b z t' h' w' to b 3 t h w.

        Args:
            latents: normalised per channel.
            clamp: limit the result to [-1, 1]; training needs it as it is.
        """
        return self._decode(latents, None, clamp)

    def forward(
        self, video: Tensor, generator: torch.Generator | None = None, touch_all: bool = False
    ) -> tuple[Tensor, Gaussian]:
        """For training: the reconstruction from sampled latents, not clamped, and their distribution.

        Args:
            video: b 3 t h w in [-1, 1].
            generator: of the latents' noise.
            touch_all: give kernels over time, which images do not use, gradients of zero: where other processes train
                on videos meanwhile, all must have the same gradients to add up.
        """
        posterior = self.encode(video)
        reconstruction = self.decode(posterior.sample(generator), clamp=False)
        if touch_all:
            temporal = [value for name, value in self.named_parameters() if ".time_conv." in name]
            reconstruction = reconstruction + sum((0 * value.sum() for value in temporal), video.new_zeros(()))
        return reconstruction, posterior

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Tensor], tiling: Tiling | None = None) -> Iterator[Tensor]:
        """`encode(...).mean` chunk by chunk, in memory that does not grow with time.

        Args:
            chunks: b 3 t h w; 1 + stride.t * k frames first, then multiples of stride.t.
            tiling: cut large frames; not exact.

        Yields:
            b z t' h' w': the latents that each chunk completes.
        """
        stride = self.config.stride.h
        network = TiledNetwork(lambda video, cache: self._encode(video, cache).mean, tiling, stride, (stride, 1))
        yield from map(network, chunks)

    @torch.no_grad()
    def decode_stream(self, latents: Iterable[Tensor], tiling: Tiling | None = None) -> Iterator[Tensor]:
        """`decode` chunk by chunk, in memory that does not grow with time.

        Args:
            latents: b z t' h' w', any number of latent frames a chunk; multiples of 4 are fastest on a CPU.
            tiling: cut large frames; not exact.

        Yields:
            b 3 t h w: the frames of each chunk.
        """
        stride = self.config.stride.h
        network = TiledNetwork(lambda chunk, cache: self._decode(chunk, cache, clamp=True), tiling, stride, (1, stride))
        yield from map(network, latents)

    def _encode(self, video: Tensor, cache: Cache | None) -> Gaussian:
        num_before = 0 if cache is None or cache.is_first else 1
        VideoShape(num_before + video.shape[2], *video.shape[3:]).latent(self.config.stride)
        x = _to_patches(video, self.config.patch_size or 1)
        raw_mean, raw_logvar = self.quant_conv(self.encoder(x, cache)).chunk(2, dim=1)  # b z t' h' w'
        raw_logvar = raw_logvar.clamp(-30.0, 20.0)
        mean, std = self._latent_statistics(raw_mean)
        return Gaussian((raw_mean - mean) / std, torch.exp(0.5 * raw_logvar) / std, raw_mean, raw_logvar)

    def _decode(self, latents: Tensor, cache: Cache | None, clamp: bool) -> Tensor:
        mean, std = self._latent_statistics(latents)
        x = self.post_quant_conv((latents * std + mean).contiguous(memory_format=CHANNELS_LAST))
        video = _from_patches(self.decoder(x, cache), self.config.patch_size or 1)  # b 3 t h w
        return video.clamp(-1, 1) if clamp else video

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, c 1 1 1 each. Tensors of the config, which alone holds them."""
        mean, std = (like.new_tensor(v).view(-1, 1, 1, 1) for v in (self.config.latents_mean, self.config.latents_std))
        return mean, std


def split_latents(latents: Tensor, stride: Stride, num_pixels: int) -> list[Tensor]:
    """Latents b z t h w in chunks for `VideoVAE.decode_stream`, of about `num_pixels` pixels of each video.

    Where several latent frames fit, the sizes are those that convolutions over time like best: one more than a multiple
    of 4, then multiples of 4.
    """
    t, h, w = latents.shape[2:]
    frames = max(1, num_pixels // (stride.t * stride.h * stride.w * h * w))
    frames = min(frames - frames % 4 if frames > 4 else frames, t)
    first = min(1 + frames if frames >= 4 else frames, t)
    return [latents[:, :, :first], *latents[:, :, first:].split(frames, dim=2)] if first < t else [latents]


def _to_patches(video: Tensor, size: int) -> Tensor:
    x = rearrange(video, "b c t (h q) (w r) -> b t h w (c r q)", q=size, r=size)  # channels last from here on
    return x.contiguous().movedim(-1, 1)


def _from_patches(x: Tensor, size: int) -> Tensor:
    return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=size, r=size)
