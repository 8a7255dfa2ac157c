"""Frames too large for memory, in overlapping tiles that are blended where they overlap.

Causal chunks over time are exact (`vae_convs.Cache`); tiles over rows and columns are not, since the middle block
attends to the whole frame and convolutions see zeros beyond a tile's border.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from video_dit.vae_convs import Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How frames are cut. The defaults are diffusers' for Wan.

    Attributes:
        tile_px: longest side of a tile.
        overlap_px: by how much neighbours overlap at least.
    """

    tile_px: int = 256
    overlap_px: int = 64

    def __post_init__(self) -> None:
        if not 0 < 2 * self.overlap_px <= self.tile_px:
            raise ValueError(
                f"overlap_px={self.overlap_px}: must be positive and at most half of tile_px={self.tile_px}"
            )


class Span(NamedTuple):
    """A tile's place along one axis, in latents, and how much each of its rows counts (they add up to 1 over tiles)."""

    start: int
    stop: int
    weights: Tensor

    def crop(self, scale: int) -> slice:
        """Its place where a latent covers `scale` rows or columns."""
        return slice(self.start * scale, self.stop * scale)


def spans(length: int, tile: int, overlap: int, scale: int) -> list[Span]:
    """As few tiles as cover an axis, evenly placed, with linear ramps where neighbours overlap.

    Args:
        length, tile, overlap: in latents.
        scale: weights for each latent.
    """
    num_tiles = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
    size = min(tile, length)
    starts = [round(i * (length - size) / max(1, num_tiles - 1)) for i in range(num_tiles)]
    place = torch.arange(length * scale) + 0.5
    ramps = torch.ones(num_tiles, length * scale)
    for number, (before, after) in enumerate(pairwise(starts)):
        low, high = after * scale, (before + size) * scale
        share = ((place - low) / (high - low)).clamp(0, 1)  # of the later tile
        ramps[number] *= 1 - share
        ramps[number + 1] *= share
    ramps /= ramps.sum(dim=0)  # where three overlap
    return [
        Span(start, start + size, ramp[start * scale : (start + size) * scale])
        for start, ramp in zip(starts, ramps, strict=True)
    ]


class TiledNetwork:
    """A streamed encoder or decoder that sees a video tile by tile; each tile keeps its own cache.

    Args:
        network: takes b c t h w and the tile's cache.
        tiling: None for whole frames.
        stride: pixels a side of a latent.
        scales: rows a latent covers in the network's input and in its output.
    """

    def __init__(
        self, network: Callable[[Tensor, Cache], Tensor], tiling: Tiling | None, stride: int, scales: tuple[int, int]
    ) -> None:
        self._network, self._tiling, self._stride, self._scales = network, tiling, stride, scales
        self._caches: list[Cache] = []

    def __call__(self, x: Tensor) -> Tensor:
        """The next chunk, b c t h w to b c' t' h' w'."""
        before, after = self._scales
        height, width = x.shape[3] // before, x.shape[4] // before
        tiles = list(product(self._spans(height), self._spans(width)))
        self._caches = self._caches or [Cache() for _ in tiles]
        outputs = []
        for (rows, columns), cache in zip(tiles, self._caches, strict=True):
            outputs.append(self._network(x[..., rows.crop(before), columns.crop(before)], cache))
            cache.is_first = False
        if len(outputs) == 1:
            return outputs[0]
        whole = outputs[0].new_zeros(*outputs[0].shape[:3], height * after, width * after)
        for (rows, columns), output in zip(tiles, outputs, strict=True):
            weights = torch.outer(rows.weights, columns.weights).to(output)
            whole[..., rows.crop(after), columns.crop(after)] += output * weights
        return whole

    def _spans(self, length: int) -> list[Span]:
        if self._tiling is None:
            return spans(length, length, 0, self._scales[1])
        tile, overlap = self._tiling.tile_px // self._stride, -(-self._tiling.overlap_px // self._stride)
        return spans(length, max(2 * overlap, tile), overlap, self._scales[1])
