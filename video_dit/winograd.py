"""Convolutions over time with fewer multiplications: Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308).

m outputs of a 3-tap filter need m + 2 multiplications instead of 3 m: inputs and taps are polynomials, whose product is
found by interpolation at points 0, +-a, +-b and infinity. A "multiplication" is here a 2-D convolution of whole frames,
so that the sums around it are cheap. Half the work for m = 4, two thirds for m = 2; errors stay those of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

MIN_CHANNELS, MIN_PIXELS = 32, 256  # below, the sums cost more than the multiplications they save
TILES_AT_ONCE = 4


class Tile(Protocol):
    """F(m, 3): m outputs from m + 2 inputs, by m + 2 products of transformed inputs and transformed taps."""

    size: int

    def inputs(self, x: Sequence[Tensor]) -> Iterator[Tensor]:
        """m + 2 inputs to m + 2 factors."""

    def taps(self, w: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """3 taps to m + 2 factors."""

    def outputs(self, p: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """m + 2 products to m outputs."""


class Tile4:
    """m = 4. Products of points near 1, and a * b = 1, keep the errors smallest."""

    size = 4
    a, b = 2 / 3, 3 / 2
    aa, bb = a * a, b * b
    at_a, at_b = 1 / (2 * aa * (aa - bb)), 1 / (2 * bb * (bb - aa))  # the points' weights in the interpolation

    @classmethod
    def inputs(cls, x: Sequence[Tensor]) -> Iterator[Tensor]:
        """Six frames, transformed one after the other."""
        x0, x1, x2, x3, x4, x5 = x
        yield (x0 + x4).sub(x2, alpha=cls.aa + cls.bb)
        even, odd = torch.sub(x4, x2, alpha=cls.bb), torch.sub(x3, x1, alpha=cls.bb)
        yield torch.add(even, odd, alpha=cls.a)
        yield torch.sub(even, odd, alpha=cls.a)
        even, odd = torch.sub(x4, x2, alpha=cls.aa), torch.sub(x3, x1, alpha=cls.aa)
        yield torch.add(even, odd, alpha=cls.b)
        yield torch.sub(even, odd, alpha=cls.b)
        yield (x1 + x5).sub(x3, alpha=cls.aa + cls.bb)

    @classmethod
    def taps(cls, w: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Three taps."""
        at_a, at_b = torch.add(w[0], w[2], alpha=cls.aa), torch.add(w[0], w[2], alpha=cls.bb)
        return (
            w[0],
            torch.add(at_a, w[1], alpha=cls.a),
            torch.sub(at_a, w[1], alpha=cls.a),
            torch.add(at_b, w[1], alpha=cls.b),
            torch.sub(at_b, w[1], alpha=cls.b),
            w[2],
        )

    @classmethod
    def outputs(cls, p: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four frames."""
        even_a, odd_a, even_b, odd_b = p[1] + p[2], p[1] - p[2], p[3] + p[4], p[3] - p[4]

        def power(x: Tensor, y: Tensor, exponent: int) -> Tensor:
            return (x * (cls.at_a * cls.a**exponent)).add(y, alpha=cls.at_b * cls.b**exponent)

        return (
            power(even_a, even_b, 0).add(p[0]),
            power(odd_a, odd_b, 1),
            power(even_a, even_b, 2),
            power(odd_a, odd_b, 3).add(p[5]),
        )


class Tile2:
    """m = 2, points 0, +-1 and infinity."""

    size = 2

    @classmethod
    def inputs(cls, x: Sequence[Tensor]) -> Iterator[Tensor]:
        """Four frames."""
        yield from (x[0] - x[2], x[2] + x[1], x[2] - x[1], x[3] - x[1])

    @classmethod
    def taps(cls, w: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Three taps."""
        even, odd = (w[0] + w[2]) / 2, w[1] / 2
        return w[0], even + odd, even - odd, w[2]

    @classmethod
    def outputs(cls, p: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Two frames."""
        return p[0] + p[1] + p[2], p[1] - p[2] + p[3]


TILES: tuple[Tile, ...] = (Tile4, Tile2)


def is_worthwhile(x: Tensor, num_outputs: int) -> bool:
    """Whether `filter_frames` is faster than the convolution itself, for `x` b c t h w in float32 on a CPU."""
    batch, channels, _, height, width = x.shape
    return num_outputs >= 2 and channels >= MIN_CHANNELS and batch * num_outputs * height * width >= MIN_PIXELS


def filter_frames(frames: Tensor, weight: Tensor, convolve: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Valid three-tap convolution over time, without bias; equal to rounding.

    Args:
        frames: n + 2, b h w c.
        weight: c_out c 3 rows columns.
        convolve: a frame, b h w c, with a kernel c_out c rows columns, to b h w c_out.

    Returns:
        n of b h w c_out.
    """
    taps, num_outputs = weight.unbind(2), len(frames) - 2
    outputs: list[Tensor] = []

    for tile in TILES:
        num_tiles = (num_outputs - len(outputs)) // tile.size
        if num_tiles:
            kernels = tile.taps(taps)
            tiled = frames[len(outputs) : len(outputs) + num_tiles * tile.size + 2]
            for window in tiled.unfold(0, tile.size + 2, tile.size).unbind():  # b h w c m+2
                factors = zip(tile.inputs(window.unbind(-1)), kernels, strict=True)
                outputs += tile.outputs([convolve(x, kernel) for x, kernel in factors])
    for number in range(len(outputs), num_outputs):
        y = [convolve(frame, tap) for frame, tap in zip(frames[number : number + 3], taps, strict=True)]
        outputs.append(y[0] + y[1] + y[2])
    return outputs
