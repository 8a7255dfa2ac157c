"""Convolutions over time with fewer multiplications: Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308).

m outputs of a 3-tap filter need m + 2 multiplications instead of 3 m: inputs and taps are polynomials, whose product is
found by interpolation at points 0, +-a, +-b and infinity. A "multiplication" is here a 2-D convolution of whole frames,
so that the sums around it are cheap. Half the work for m = 4, two thirds for m = 2; errors stay those of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

MIN_CHANNELS, MIN_PIXELS = 32, 256  # below, the sums cost more than the multiplications they save

Outputs = Sequence[Tensor | None]  # where to write each output; a new tensor for None


class Tile4:
    """F(4, 3): 4 outputs from 6 inputs, by 6 products of transformed inputs and taps.

    Products of points near 1, and a * b = 1, keep the errors smallest.

    The taps carry the points' weights in the interpolation, by powers that leave the outputs the fewest sums.
    """

    size = 4
    a, b = 2 / 3, 3 / 2
    aa, bb = a * a, b * b
    at_a, at_b = a / (2 * aa * (aa - bb)), bb / (2 * bb * (bb - aa))

    @classmethod
    def inputs(cls, x: Sequence[Tensor]) -> Iterator[Tensor]:
        """Six frames, transformed one after the other."""
        x0, x1, x2, x3, x4, x5 = x
        yield (x0 + x4).sub_(x2, alpha=cls.aa + cls.bb)
        even, odd = torch.sub(x4, x2, alpha=cls.bb), torch.sub(x3, x1, alpha=cls.bb)
        yield torch.add(even, odd, alpha=cls.a)
        yield torch.sub(even, odd, alpha=cls.a)
        even, odd = torch.sub(x4, x2, alpha=cls.aa), torch.sub(x3, x1, alpha=cls.aa)
        yield torch.add(even, odd, alpha=cls.b)
        yield torch.sub(even, odd, alpha=cls.b)
        yield (x1 + x5).sub_(x3, alpha=cls.aa + cls.bb)

    @classmethod
    def taps(cls, w: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Three taps."""
        even_a = torch.add(w[0], w[2], alpha=cls.aa).mul_(cls.at_a)
        even_b = torch.add(w[0], w[2], alpha=cls.bb).mul_(cls.at_b)
        odd_a, odd_b = w[1] * (cls.at_a * cls.a), w[1] * (cls.at_b * cls.b)
        return w[0], even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, w[2]

    @classmethod
    def outputs(cls, p: Sequence[Tensor], out: Outputs) -> tuple[Tensor, ...]:
        """Four frames."""
        even_a, odd_a, even_b, odd_b = p[1] + p[2], p[1] - p[2], p[3] + p[4], p[3] - p[4]
        return (
            torch.add(torch.add(p[0], even_a, alpha=1 / cls.a), even_b, alpha=1 / cls.bb, out=out[0]),
            torch.add(odd_a, odd_b, alpha=1 / cls.b, out=out[1]),
            torch.add(even_b, even_a, alpha=cls.a, out=out[2]),
            torch.add(torch.add(p[5], odd_a, alpha=cls.aa), odd_b, alpha=cls.b, out=out[3]),
        )


class Tile2:
    """F(2, 3), at points 0, +-1 and infinity."""

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
    def outputs(cls, p: Sequence[Tensor], out: Outputs) -> tuple[Tensor, ...]:
        """Two frames."""
        return torch.add(p[0] + p[1], p[2], out=out[0]), torch.add(p[1] - p[2], p[3], out=out[1])


Tile = type[Tile4] | type[Tile2]
TILES: tuple[Tile, ...] = (Tile4, Tile2)


@functools.cache
def bias_shares(tile: Tile) -> tuple[float, ...]:
    """The m + 2 products whose outputs are all 1: a bias in these shares on the products is the outputs' bias."""
    x, w = torch.ones(tile.size + 2, dtype=torch.float64), torch.tensor([1.0, 0, 0], dtype=torch.float64)
    factors = zip(tile.inputs(x.unbind()), tile.taps(w.unbind()), strict=True)
    return tuple((a * b).item() for a, b in factors)


def is_worthwhile(x: Tensor, num_outputs: int) -> bool:
    """Whether `filter_frames` is faster than the convolution itself, for `x` b c t h w in float32 on a CPU."""
    batch, channels, _, height, width = x.shape
    return num_outputs >= 2 and channels >= MIN_CHANNELS and batch * num_outputs * height * width >= MIN_PIXELS


Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def filter_frames(
    frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None, convolve: Convolve, out: Outputs
) -> list[Tensor]:
    """Valid three-tap convolution over time; equal to rounding.

    Args:
        frames: n + 2 of b h w c.
        weight: c_out c 3 rows columns.
        bias: c_out.
        convolve: a frame, b h w c, with a kernel, c_out c rows columns, and a bias, to b h w c_out.
        out: n of b h w c_out to write to, without gradients, or of None.

    Returns:
        n of b h w c_out.
    """
    taps, outputs = weight.unbind(2), list[Tensor]()
    for tile in TILES:
        if len(out) - len(outputs) < tile.size:
            continue
        kernels = tile.taps(taps)
        shares = bias_shares(tile)  # type: ignore[arg-type]  # a class is hashable, whatever mypy says
        biases = [None if bias is None else bias * share for share in shares]
        while (start := len(outputs)) <= len(out) - tile.size:
            factors = zip(tile.inputs(frames[start : start + tile.size + 2]), kernels, biases, strict=True)
            outputs += tile.outputs([convolve(*factor) for factor in factors], out[start : start + tile.size])
    for start in range(len(outputs), len(out)):
        y = [convolve(*factor) for factor in zip(frames[start : start + 3], taps, (bias, None, None), strict=True)]
        outputs.append(torch.add(y[0] + y[1], y[2], out=out[start]))
    return outputs
