"""Parts of the transformer: embeddings, modulation, attention layers. Norms and gates compute in float32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from video_dit.attention import Attend, Segments, attend
from video_dit.rope import rotate
from video_dit.shapes import Stride


class Modulation(NamedTuple):
    """Shift, scale and gate, g d each, float32 (DiT, arXiv 2212.09748, adaLN-Zero); see `per_group`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def per_group(table: Tensor, frame_of_token: Tensor | None) -> Tensor:
    """Rows of a table for groups of neighbouring tokens that share one: f k d -> g k d.

    Args:
        table: a row for each frame.
        frame_of_token: n, for frames of different sizes: each token is a group then; None where all frames have equally
            many tokens: each frame is a group, and nothing needs to be copied.
    """
    # index_select, not [...]: its backward adds up in a fixed order, whatever the number of threads
    return table if frame_of_token is None else table.index_select(0, frame_of_token)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then scale and shift; n d, g d."""
    normed = _grouped(F.layer_norm(x.float(), x.shape[-1:], eps=eps), shift)  # g n/g d
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None]).flatten(0, 1).to(x.dtype)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Residual addition through a gate; n d, g d."""
    y = torch.addcmul(_grouped(x.float(), gate), _grouped(update.float(), gate), gate[:, None])  # g n/g d
    return y.flatten(0, 1).to(x.dtype)


def _grouped(x: Tensor, rows: Tensor) -> Tensor:
    """n d to g n/g d, for g rows; there may be no tokens."""
    num_groups = rows.shape[0]
    return x.unflatten(0, (num_groups, x.shape[0] // max(1, num_groups)))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    """Sinusoids of the timesteps (DDPM, arXiv 2006.11239), cosines first.

    Args:
        timesteps: f, in [0, 1000].
        dim: even width.

    Returns:
        f dim, float32.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device) / half)
    angle = timesteps.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class PatchEmbedding(nn.Module):
    """Linear embedding of patches; the weight has the shape of the convolution it equals."""

    def __init__(self, channels: int, patch: Stride, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, channels, *patch))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight.view(dim, -1) if not self.weight.is_meta else self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """n (c pt ph pw) -> n d."""
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class SelfAttention(nn.Module):
    """Attention of a sample's tokens to each other, with 3-D rotary positions."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim, eps=eps)  # across heads, as in Wan
        self.norm_k = nn.RMSNorm(dim, eps=eps)
        self.out = nn.Linear(dim, dim)
        self.attend: Attend = attend  # the seam for backends and context parallelism

    def forward(self, x: Tensor, rotation: Tensor, segments: Segments) -> Tensor:
        """n d -> n d; rotation n e/2 2."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # n d each
        q, k, v = (split_heads(y, self.num_heads) for y in (self.norm_q(q), self.norm_k(k), v))  # n heads e
        y = self.attend(rotate(q, rotation), rotate(k, rotation), v, segments)
        return self.out(rearrange(y, "n heads e -> n (heads e)"))


class ImageEmbedding(nn.Module):
    """CLIP's vectors of a sample's images to the model's width (Wan 2.1 image-to-video): norm, MLP, norm.

    With `num_positions`, every image token of a sample first gets the learned vector of its place among them, which
    tells the first frame from the last.
    """

    def __init__(self, image_dim: int, dim: int, num_positions: int | None) -> None:
        super().__init__()
        self.positions = None if num_positions is None else nn.Parameter(torch.zeros(1, num_positions, image_dim))
        self.mlp = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        """m c -> m d; with positions, every sample has as many image tokens as there are positions."""
        if self.positions is not None:
            samples = rearrange(images, "(b m) c -> b m c", m=self.positions.shape[1])
            images = rearrange(samples + self.positions, "b m c -> (b m) c")
        return self.mlp(images)  # m d


class TextKeys(NamedTuple):
    """What a block's cross-attention makes of texts: keys and values, s heads e each."""

    keys: Tensor
    values: Tensor

    def first(self, num_tokens: int) -> TextKeys:
        """Those of the first text tokens."""
        return TextKeys(self.keys[:num_tokens], self.values[:num_tokens])


class CrossAttention(nn.Module):
    """Attention of a sample's tokens to its own text and, with `sees_images`, to its own images; the two add up."""

    def __init__(self, dim: int, num_heads: int, eps: float, sees_images: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)
        if sees_images:
            self.image_kv = nn.Linear(dim, 2 * dim)
            self.norm_image_k = nn.RMSNorm(dim, eps=eps)
        self.out = nn.Linear(dim, dim)
        self.attend: Attend = attend

    def forward(
        self,
        x: Tensor,
        text: Tensor | TextKeys,
        segments: Segments,
        images: Tensor | None = None,
        image_segments: Segments | None = None,
    ) -> Tensor:
        """n d, s d, perhaps m d -> n d."""
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)  # n heads e
        y = self.attend(q, *(text if isinstance(text, TextKeys) else self.text_keys(text)), segments)
        if images is not None and image_segments is not None:
            y = y + self.attend(q, *self._keys(self.image_kv(images), self.norm_image_k), image_segments)
        return self.out(rearrange(y, "n heads e -> n (heads e)"))

    def text_keys(self, text: Tensor) -> TextKeys:
        """Of texts s d."""
        return self._keys(self.kv(text), self.norm_k)

    def _keys(self, kv: Tensor, norm_k: nn.Module) -> TextKeys:
        k, v = kv.chunk(2, dim=-1)  # s d each
        return TextKeys(split_heads(norm_k(k), self.num_heads), split_heads(v, self.num_heads))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """n (heads e) -> n heads e."""
    return rearrange(x, "n (heads e) -> n heads e", heads=num_heads)
