"""The layers of the causal video VAE: Wan 2.1's plain form and Wan 2.2's residual form.

Every layer takes `b c t h w` and an optional `Cache`. Without one it sees a whole video, with zeros before the first
frame; with one it sees the next chunk, after the frames that the cache kept. The first frame of a video stands alone
wherever time is resampled, so `1 + 4k` frames become `1 + k` latents and an image is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn


class Cache:
    """What a network keeps between two chunks of one video: the last input frames of each layer that looks back.

    Attributes:
        is_first: no chunk has gone through yet.
    """

    def __init__(self) -> None:
        self.is_first = True
        self._past: dict[nn.Module, Tensor] = {}

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._past

    def extend(self, layer: nn.Module, x: Tensor, num_frames: int) -> Tensor:
        """`x` after the frames kept for `layer`, if any; keeps the last `num_frames` of that for the next chunk."""
        if layer in self._past:
            x = torch.cat([self._past[layer], x], dim=2)
        self._past[layer] = x[:, :, -num_frames:].clone()  # a view would hold the whole chunk in memory
        return x


def is_first_chunk(cache: Cache | None) -> bool:
    """Whether the video starts here, be it whole or in chunks."""
    return cache is None or cache.is_first


class RMSNorm(nn.Module):
    """Divides each pixel's channels by their root mean square, then scales them by `gamma`.

    Args:
        dim: channels.
        num_axes: axes of size one after the channels in `gamma`'s stored shape.
    """

    def __init__(self, dim: int, num_axes: int = 3) -> None:
        super().__init__()
        self.dim = dim
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        """`b c t h w` to the same shape and dtype; the norm is taken in float32."""
        y = x.float()  # sums of squares: on CPU several times faster than a vector norm over a strided axis
        scale = y.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()  # b 1 t h w
        return (y * scale).to(x.dtype) * (self.dim**0.5 * self.gamma).view(-1, 1, 1, 1)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`F.conv3d`; on CPU by oneDNN for batch 1 too, where small maps would go to a kernel 2 to 4 times slower."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] == 1 and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, tuple(stride), tuple(padding))


class CausalConv3d(nn.Conv3d):
    """A convolution over frames, rows and columns whose output sees no later frame: odd kernel, stride 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.num_past = kernel[0] - 1

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t h w`."""
        weight = self.weight
        if cache is None and x.shape[2] == 1:
            weight = weight[:, :, -1:]  # an image: all other taps would see zeros
        elif self.num_past:
            if cache is None or self not in cache:
                x = F.pad(x, (0, 0, 0, 0, self.num_past, 0))
            if cache is not None:
                x = cache.extend(self, x, self.num_past)
        return conv3d(x, weight, self.bias, (1, 1, 1), (0, *self.padding[1:]))


class FrameConv2d(nn.Conv2d):
    """A 2-D convolution of every frame of a video, without moving frames into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        """`b c t h w` to `b c_out t h' w'`."""
        return conv3d(x, self.weight.unsqueeze(2), self.bias, (1, *self.stride), (0, *self.padding))


class ResidualBlock(nn.Module):
    """Two causal convolutions around a skip connection."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, (3, 3, 3))
        self.norm2 = RMSNorm(out_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_dim, out_dim, (3, 3, 3))
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t h w`."""
        y = self.conv1(F.silu(self.norm1(x)), cache)  # b c_out t h w
        y = self.conv2(self.dropout(F.silu(self.norm2(y))), cache)
        return y + self.conv_shortcut(x)


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame, around a skip connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_axes=2)
        self.to_qkv = FrameConv2d(dim, 3 * dim, 1)
        self.proj = FrameConv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to the same shape; frames do not mix, so nothing is kept in the cache."""
        height = x.shape[3]
        qkv = self.to_qkv(self.norm(x))  # b 3c t h w
        q, k, v = rearrange(qkv, "b (qkv c) t h w -> qkv (b t) 1 (h w) c", qkv=3)
        y = F.scaled_dot_product_attention(q, k, v)  # (b t) 1 (h w) c
        y = rearrange(y, "(b t) 1 (h w) c -> b c t h w", b=x.shape[0], h=height)
        return x + self.proj(y)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the coarsest resolution."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim, dropout) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(dim)])

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to the same shape."""
        x = self.resnets[0](x, cache)
        x = self.attentions[0](x, cache)
        return self.resnets[1](x, cache)


class Downsample(nn.Module):
    """Halves rows and columns and, where `is_temporal`, maps `1 + 2k` frames to `1 + k`."""

    def __init__(self, dim: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), FrameConv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c t' h/2 w/2`."""
        x = self.resample(x)  # b c t h/2 w/2
        if self.time_conv is None:
            return x
        frames = x if cache is None else cache.extend(self, x, 1)
        if not is_first_chunk(cache):
            return self.time_conv(frames)
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(frames)], dim=2)


class Upsample(nn.Module):
    """Doubles rows and columns and, where `is_temporal`, maps `1 + k` frames to `1 + 2k`."""

    def __init__(self, dim: int, out_dim: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(1.0, 2.0, 2.0), mode="nearest"), FrameConv2d(dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' 2h 2w`."""
        if self.time_conv is not None:
            num_alone = 1 if is_first_chunk(cache) else 0  # time_conv never sees the first frame
            if x.shape[2] > num_alone:
                pairs = self.time_conv(x[:, :, num_alone:], cache)  # b 2c t h w
                pairs = rearrange(pairs, "b (pair c) t h w -> b c (t pair) h w", pair=2)
                x = torch.cat([x[:, :, :num_alone], pairs], dim=2)
        return self.resample(x)


class AverageDown(nn.Module):
    """Shortcut of a downsampling block: pixels move into channels, then groups of channels are averaged."""

    def __init__(self, in_dim: int, out_dim: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.out_dim, self.factor_t, self.factor_s = out_dim, factor_t, factor_s

    def forward(self, x: Tensor) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`. A video's first frame is averaged with zeros."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.factor_t, 0))
        factors = {"p": self.factor_t, "q": self.factor_s, "r": self.factor_s}
        x = rearrange(x, "b c (t p) (h q) (w r) -> b (c p q r) t h w", **factors)
        return reduce(x, "b (c group) t h w -> b c t h w", "mean", c=self.out_dim)


class DuplicateUp(nn.Module):
    """Shortcut of an upsampling block: channels are repeated, then move into pixels."""

    def __init__(self, in_dim: int, out_dim: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.factor_t, self.factor_s = factor_t, factor_s
        self.num_repeats = out_dim * factor_t * factor_s**2 // in_dim

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`."""
        x = repeat(x, "b c t h w -> b (c repeats) t h w", repeats=self.num_repeats)
        factors = {"p": self.factor_t, "q": self.factor_s, "r": self.factor_s}
        x = rearrange(x, "b (c p q r) t h w -> b c (t p) (h q) (w r)", **factors)
        return x[:, :, self.factor_t - 1 :] if is_first_chunk(cache) else x


def residual_blocks(in_dim: int, out_dim: int, num_blocks: int, dropout: float) -> nn.ModuleList:
    dims = [in_dim] + [out_dim] * num_blocks
    return nn.ModuleList([ResidualBlock(a, b, dropout) for a, b in pairwise(dims)])


class ResidualDownBlock(nn.Module):
    """A stage of the residual encoder. `is_temporal` is None in the last stage, which does not resample."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, dropout: float, is_temporal: bool | None) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_dim, out_dim, num_blocks, dropout)
        self.downsampler = None if is_temporal is None else Downsample(out_dim, is_temporal)
        self.avg_shortcut = AverageDown(in_dim, out_dim, 2 if is_temporal else 1, 1 if is_temporal is None else 2)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`."""
        shortcut = self.avg_shortcut(x)  # b c_out t' h' w'
        for layer in self.resnets:
            x = layer(x, cache)
        if self.downsampler is not None:
            x = self.downsampler(x, cache)  # b c_out t' h' w'
        return x + shortcut


class UpBlock(nn.Module):
    """A stage of the plain decoder; its upsampler halves the channels. `is_temporal` is None in the last stage."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, dropout: float, is_temporal: bool | None) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_dim, out_dim, num_blocks, dropout)
        self.upsamplers = nn.ModuleList()
        if is_temporal is not None:
            self.upsamplers.append(Upsample(out_dim, out_dim // 2, is_temporal))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, cache)
        return x


class ResidualUpBlock(nn.Module):
    """A stage of the residual decoder. `is_temporal` is None in the last stage, which does not resample."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, dropout: float, is_temporal: bool | None) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_dim, out_dim, num_blocks, dropout)
        self.upsampler, self.avg_shortcut = None, None
        if is_temporal is not None:
            self.upsampler = Upsample(out_dim, out_dim, is_temporal)
            self.avg_shortcut = DuplicateUp(in_dim, out_dim, 2 if is_temporal else 1, 2)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`."""
        y = x
        for layer in self.resnets:
            y = layer(y, cache)
        if self.upsampler is None or self.avg_shortcut is None:
            return y
        return self.upsampler(y, cache) + self.avg_shortcut(x, cache)
