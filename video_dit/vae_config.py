"""The size and form of a VideoVAE."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from video_dit.shapes import Stride

# Wan 2.1's latents over its training set, channel by channel.
WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoVAEConfig:
    """Size and form of a VideoVAE, in the words of diffusers' config.json. The defaults are Wan 2.1's.

    Attributes:
        base_dim: channels of the encoder's finest stage.
        decoder_base_dim: the decoder's; None for the encoder's.
        z_dim: channels of the latents.
        dim_mult: each stage's channels in units of the base, finest first.
        num_res_blocks: residual blocks an encoder stage; the decoder has one more.
        attn_scales: always empty; attention stands in the middle block only.
        temperal_downsample: whether time is halved after each stage but the last.
        dropout: probability inside the residual blocks.
        latents_mean: mean of each channel of the raw latents, by which they are normalised.
        latents_std: standard deviation of each channel of the raw latents.
        is_residual: Wan 2.2's form, with parameter-free shortcuts around the stages.
        in_channels: channels of the encoder's input: 3 * patch_size**2.
        out_channels: the same for the decoder's output.
        patch_size: pixels a side that are moved into channels; None for 1.
        scale_factor_temporal: stride in frames that follows from the above.
        scale_factor_spatial: stride in pixels that follows from the above.

    Raises:
        ValueError: naming the field, its value and the rule it breaks.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = WAN_MEAN
    latents_std: tuple[float, ...] = WAN_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        patch, stride = self.patch_size or 1, self.stride
        for name in ("base_dim", "decoder_dim", "z_dim", "num_res_blocks"):
            self._check(name, getattr(self, name) >= 1, "is at least 1")
        self._check("patch_size", patch >= 1, "is at least 1")
        self._check("dim_mult", min(self.dim_mult, default=0) >= 1, "is not empty and all at least 1")
        self._check("attn_scales", not self.attn_scales, "no published model has attention in its stages: use ()")
        num_halvings = len(self.dim_mult) - 1
        self._check(
            "temperal_downsample", len(self.temperal_downsample) == num_halvings, f"needs {num_halvings} values"
        )
        self._check("dropout", 0 <= self.dropout < 1, "is in [0, 1)")
        for name in ("latents_mean", "latents_std"):
            self._check(name, len(getattr(self, name)) == self.z_dim, f"needs z_dim={self.z_dim} values")
        self._check("latents_std", min(self.latents_std) > 0, "is positive")
        for name in ("in_channels", "out_channels"):
            self._check(name, getattr(self, name) == 3 * patch**2, f"is 3 * patch_size**2 = {3 * patch**2}")
        self._check("scale_factor_temporal", self.scale_factor_temporal == stride.t, f"the stages give {stride.t}")
        self._check("scale_factor_spatial", self.scale_factor_spatial == stride.h, f"the stages give {stride.h}")
        self._check_widths()

    def _check(self, name: str, is_fine: bool, rule: str) -> None:
        if not is_fine:
            raise ValueError(f"{name}={getattr(self, name)}: {rule}")

    def _check_widths(self) -> None:
        """The layers without parameters move whole groups of channels."""
        if self.is_residual:
            *halved, last = pairwise((1, *self.dim_mult))
            is_even = all(4 * before % after == 0 for before, after in halved) and last[0] % last[1] == 0
            self._check("dim_mult", is_even, "each divides 4 times the one before, the last divides the one before")
        else:
            is_even = all(self.decoder_dim * mult % 2 == 0 for mult in self.dim_mult[1:])
            self._check("dim_mult", is_even, f"times {self.decoder_dim} channels is even, to be halved")

    @property
    def decoder_dim(self) -> int:
        """Channels of the decoder's finest stage."""
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def stride(self) -> Stride:
        """Frames, rows and columns that one latent covers."""
        side = (self.patch_size or 1) * 2 ** (len(self.dim_mult) - 1)
        return Stride(2 ** sum(self.temperal_downsample), side, side)
