"""Causal 3 x 3 x 3 convolutions with fewer multiplications: Winograd's minimal filtering (Lavin and Gray, 1509.09308).

Along an axis, m outputs of a 3-tap filter need m + 2 multiplications instead of 3 m: inputs and taps are polynomials,
and their product is found by interpolation. Over time, and over rows as well where channels are wide, the rest stays an
ordinary convolution: of transformed frames, or of their transformed rows. The transforms are small matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Convolve = Callable[[Tensor, Tensor, Tensor | None, Sequence[int]], Tensor]  # x b h w c, kernel, bias, padding

# Outputs a tile and its interpolation points, besides infinity; those of 4 have the smallest errors in float32.
POINTS = {4: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2), 2: (0, 1, -1)}
# Below, the transforms cost more than the multiplications they save.
MIN_CHANNELS, MIN_PIXELS = 32, 2048
MIN_CHANNELS_BY_ROWS, MIN_PIXELS_BY_ROWS, ROWS = 64, 4096, 4


class Filter(NamedTuple):
    """Transforms for tiles of m outputs.

    Attributes:
        inputs: of the inputs, m + 2 by m + 2.
        taps: of the taps, m + 2 by 3.
        outputs: of the products, m by m + 2.
        bias: share of each product in a constant that is to reach all outputs, m + 2.
    """

    inputs: Tensor
    taps: Tensor
    outputs: Tensor
    bias: Tensor


@functools.cache
@torch.inference_mode(False)
def minimal_filter(size: int) -> Filter:
    """The transforms for tiles of `size` outputs, float32: the product of polynomials by interpolation, transposed."""
    points = torch.tensor(POINTS[size], dtype=torch.float64)

    def powers(count: int) -> Tensor:
        at_infinity = F.one_hot(torch.tensor([count - 1]), count)
        return torch.cat([torch.linalg.vander(points, N=count), at_infinity])  # size + 2, count

    outputs = powers(size).T
    transforms = powers(size + 2).inverse().T, powers(3), outputs, torch.linalg.pinv(outputs).sum(dim=1)
    return Filter(*(matrix.float() for matrix in transforms))


def is_worthwhile(x: Tensor, num_outputs: int) -> bool:
    """Whether `filter_frames` is faster than the convolution itself, for `x` b c t h w in float32 on a CPU."""
    batch, channels, _, height, width = x.shape
    return num_outputs >= 2 and channels >= MIN_CHANNELS and batch * num_outputs * height * width >= MIN_PIXELS


def filter_frames(
    frames: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], convolve: Convolve
) -> list[Tensor]:
    """Valid three-tap convolution over time; equal to rounding.

    Args:
        frames: n + 2, b h w c.
        weight: c_out c 3 rows columns.
        bias: c_out.
        padding: rows and columns of zeros on each side.
        convolve: of single frames, kernels c_out c rows columns.

    Returns:
        n of b h w c_out.
    """
    taps = rearrange(weight, "o c k h w -> k (o h w c)")
    num_outputs = len(frames) - 2
    outputs: list[Tensor] = []
    for size in POINTS:
        num_tiles = (num_outputs - len(outputs)) // size
        if num_tiles:
            transforms = minimal_filter(size)
            kernels = (transforms.taps @ taps).view(-1, weight.shape[0], *weight.shape[3:], weight.shape[1])
            biases = [None] * (size + 2) if bias is None else list(torch.outer(transforms.bias, bias))
            prepare = _by_rows if _rows_pay(frames, num_outputs, padding) else _by_frames
            convolve_points = prepare(kernels, biases, padding, convolve)
            tiled = frames[len(outputs) : len(outputs) + num_tiles * size + 2]
            for window in tiled.unfold(0, size + 2, size).unbind():  # b h w c p each
                points = _transform(transforms.inputs, window.movedim(-1, 0))  # p b h w c
                outputs += _transform(transforms.outputs, convolve_points(points)).unbind()  # size of b h w c_out
    windows = [frames[n : n + 3] for n in range(len(outputs), num_outputs)]
    return outputs + [_convolve_directly(window, weight, bias, padding, convolve) for window in windows]


def _transform(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix on the first axis."""
    return (matrix @ x.flatten(1)).view(-1, *x.shape[1:])


def _rows_pay(frames: Tensor, num_outputs: int, padding: Sequence[int]) -> bool:
    _, batch, height, width, channels = frames.shape
    return (
        padding[0] == 1
        and height % ROWS == 0
        and channels >= MIN_CHANNELS_BY_ROWS
        and batch * num_outputs * height * width >= MIN_PIXELS_BY_ROWS
    )


def _convolve_directly(
    frames: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], convolve: Convolve
) -> Tensor:
    """Three frames to one."""
    biases = (None, None, bias)
    y = [convolve(x, weight[:, :, tap], biases[tap], padding) for tap, x in enumerate(frames)]
    return y[0] + y[1] + y[2]


def _by_frames(
    kernels: Tensor, biases: Sequence[Tensor | None], padding: Sequence[int], convolve: Convolve
) -> Callable[[Tensor], Tensor]:
    """p b h w c to p b h w c_out, by a convolution for each point; kernels p c_out rows columns c."""

    def convolve_points(points: Tensor) -> Tensor:
        parts = zip(points, kernels.movedim(-1, 2), biases, strict=True)
        return torch.stack([convolve(point, kernel, bias, padding) for point, kernel, bias in parts])

    return convolve_points


def _by_rows(
    kernels: Tensor, biases: Sequence[Tensor | None], padding: Sequence[int], convolve: Convolve
) -> Callable[[Tensor], Tensor]:
    """The same, filtering over rows: a convolution over columns for each point of time and of rows."""
    transforms = minimal_filter(ROWS)
    kernels = _transform(transforms.taps, kernels.movedim(2, 0).contiguous())  # r p c_out columns c
    kernels = kernels.unsqueeze(3).movedim(-1, 3)  # r p c_out c 1 columns
    shares = [None if bias is None else share * bias for share in transforms.bias for bias in biases]

    def convolve_points(points: Tensor) -> Tensor:
        padded = F.pad(points, (0, 0, 0, 0, 1, 1))  # p b h+2 w c
        windows = padded.unfold(2, ROWS + 2, ROWS).movedim(-1, 0)  # r p b h/4 w c
        parts = zip(_transform(transforms.inputs, windows).flatten(0, 1), kernels.flatten(0, 1), shares, strict=True)
        products = torch.stack([convolve(point, kernel, bias, (0, padding[1])) for point, kernel, bias in parts])
        products = products.unflatten(0, (ROWS + 2, -1))  # r p b h/4 w c_out
        return rearrange(_transform(transforms.outputs, products), "r p b h w c -> p b (h r) w c")

    return convolve_points
