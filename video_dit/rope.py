"""Rotary positions in three dimensions (RoFormer, arXiv 2104.09864; axes split as in Wan 2.1)."""

from __future__ import annotations

import functools

import torch
from einops import rearrange, repeat
from torch import Tensor

from video_dit.shapes import TokenGrid


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions turn with t, h and w; 128 gives 44, 42, 42."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # whoever trains after sampling must be able to save them for a backward pass
def rotations(grid: TokenGrid, head_dim: int, device: torch.device | None = None, theta: float = 1e4) -> Tensor:
    """The unit vectors that turn each pair of a head's dimensions by its token's place; kept for some grids.

    Returns:
        cosines and sines, float32, n e/2 2, tokens in t h w order; computed in float64.
    """
    turns = []
    for length, dim in zip(grid, axis_dims(head_dim), strict=True):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        turns.append(torch.stack([angle.cos(), angle.sin()], dim=-1))  # length dim/2 2
    t, h, w = grid
    turn = torch.cat(
        [
            repeat(turns[0], "t e pair -> t h w e pair", h=h, w=w),
            repeat(turns[1], "h e pair -> t h w e pair", t=t, w=w),
            repeat(turns[2], "w e pair -> t h w e pair", t=t, h=h),
        ],
        dim=-2,
    )
    return rearrange(turn, "t h w e pair -> (t h w) e pair").to(device, torch.float32)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the (even, odd) pairs of x.

    Args:
        x: n heads e.
        rotation: cosines and sines, n e/2 2.
    """
    pairs = rearrange(x.float(), "n heads (e pair) -> n heads e pair", pair=2)
    if torch.compiler.is_compiling():  # real numbers are what the compiler fuses; uncompiled, complex ones are faster
        (even, odd), (cos, sin) = pairs.unbind(-1), rotation[:, None].unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation)[:, None])
    return rearrange(turned, "n heads e pair -> n heads (e pair)").to(x.dtype)
