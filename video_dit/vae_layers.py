"""The layers of the causal video VAE: Wan 2.1's plain form and Wan 2.2's residual form.

Every layer takes `b c t h w` and an optional `Cache`. Without one it sees a whole video, with zeros before the first
frame; with one it sees the next chunk, after the frames that the cache kept. The first frame of a video stands alone
wherever time is resampled, so `1 + 4k` frames become `1 + k` latents and an image is a video of one frame.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from video_dit.vae_convs import (
    Cache,
    CausalConv3d,
    DownsampleConv2d,
    FrameConv2d,
    UpsampleConv2d,
    convolve,
    is_first_chunk,
)


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

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """`b c t h w` to the same shape and dtype; the norm is taken in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)  # b 1 t h w
        scale, gamma = (self.dim**0.5 / norm.clamp_min(1e-12)).to(x.dtype), self.gamma.view(-1, 1, 1, 1)
        if torch.is_grad_enabled():
            return x * scale * gamma
        return (x.mul_(scale) if inplace else x * scale).mul_(gamma)


def activate(norm: RMSNorm, x: Tensor, inplace: bool = False) -> Tensor:
    """SiLU of the norm; in place where asked for and no gradients are taken.

    Large new tensors cost more than the arithmetic: the system hands out their memory page by page.
    """
    return F.silu(norm(x, inplace), inplace=not torch.is_grad_enabled())


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
        spare = activate(self.norm1, x)
        y = self.conv1(spare, cache)  # b c_out t h w
        y = self.conv2(self.dropout(activate(self.norm2, y, inplace=True)), cache, spare)
        return y + self.conv_shortcut(x) if torch.is_grad_enabled() else y.add_(self.conv_shortcut(x))


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
        self.resample = nn.Sequential(nn.Identity(), DownsampleConv2d(dim))  # [1] in published names
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c t' h/2 w/2`."""
        x = self.resample(x)  # b c t h/2 w/2
        if self.time_conv is None:
            return x
        frames = x if cache is None else cache.extend(self, x, 1)
        if not is_first_chunk(cache):
            return self._halve(frames)
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self._halve(frames)], dim=2)

    def _halve(self, frames: Tensor) -> Tensor:
        assert self.time_conv is not None
        return convolve(frames, self.time_conv.weight, self.time_conv.bias, (2, 1, 1), (0, 0, 0))


class Upsample(nn.Module):
    """Doubles rows and columns and, where `is_temporal`, maps `1 + k` frames to `1 + 2k`."""

    def __init__(self, dim: int, out_dim: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), UpsampleConv2d(dim, out_dim))  # [1] in published names
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' 2h 2w`."""
        if self.time_conv is not None:
            num_alone = 1 if is_first_chunk(cache) else 0  # time_conv never sees the first frame
            if x.shape[2] > num_alone:
                pairs = self.time_conv(x[:, :, num_alone:], cache)  # b 2c t h w
                pairs = rearrange(pairs.movedim(1, -1), "b t h w (pair c) -> b (t pair) h w c", pair=2)
                x = torch.cat([x[:, :, :num_alone], pairs.movedim(-1, 1)], dim=2)
        return self.resample(x)


class AverageDown(nn.Module):
    """Shortcut of a downsampling block: pixels move into channels, then groups of channels are averaged."""

    def __init__(self, in_dim: int, out_dim: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.out_dim, self.factor_t, self.factor_s = out_dim, factor_t, factor_s

    def forward(self, x: Tensor) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`. A video's first frame is averaged with zeros."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.factor_t, 0)).movedim(1, -1)
        factors = {"p": self.factor_t, "q": self.factor_s, "r": self.factor_s}
        x = rearrange(x, "b (t p) (h q) (w r) c -> b t h w (c p q r)", **factors)
        return reduce(x, "b t h w (c group) -> b t h w c", "mean", c=self.out_dim).movedim(-1, 1)


class DuplicateUp(nn.Module):
    """Shortcut of an upsampling block: channels are repeated, then move into pixels."""

    def __init__(self, in_dim: int, out_dim: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.factor_t, self.factor_s = factor_t, factor_s
        self.num_repeats = out_dim * factor_t * factor_s**2 // in_dim

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`."""
        x = repeat(x.movedim(1, -1), "b t h w c -> b t h w (c repeats)", repeats=self.num_repeats)
        factors = {"p": self.factor_t, "q": self.factor_s, "r": self.factor_s}
        x = rearrange(x, "b t h w (c p q r) -> b (t p) (h q) (w r) c", **factors).movedim(-1, 1)
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
