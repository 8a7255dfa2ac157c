"""Convolutions over frames, rows and columns that see no later frame, and what they keep between chunks of a video.

On CPU in float32 three things make them fast: channels lie innermost (channels_last_3d), every convolution goes to
oneDNN, where PyTorch would send small maps to a kernel 2 to 4 times slower, and wide ones need half the multiplications
(`winograd`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from video_dit import winograd

CHANNELS_LAST = torch.channels_last_3d
WASTEFUL_FRAMES = 9  # from here on zeros behind too, their outputs cut off, cost less than copying

Model = TypeVar("Model", bound=nn.Module)


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
        """`x` after the frames kept for `layer`, if any; keeps the last `num_frames` of that for the next chunk.

        Where a video has had fewer, zeros stand in front of those kept.
        """
        if layer in self._past:
            x = torch.cat([self._past[layer], x], dim=2)
        kept = x[:, :, -num_frames:].clone()  # a view would hold the whole chunk in memory
        self._past[layer] = F.pad(kept, (0, 0, 0, 0, num_frames - kept.shape[2], 0))
        return x


def use_channels_last(model: Model) -> Model:
    """Lay the kernels' channels innermost, in place, as videos have them: faster where gradients are not sharded."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            layout = CHANNELS_LAST if isinstance(module, nn.Conv3d) else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return model


def is_first_chunk(cache: Cache | None) -> bool:
    """Whether the video starts here, be it whole or in chunks."""
    return cache is None or cache.is_first


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`F.conv2d` or `F.conv3d`, on CPU in float32 always by oneDNN."""
    if _is_onednn(x):
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, [1] * len(stride), 1)
    return (F.conv3d if x.ndim == 5 else F.conv2d)(x, weight, bias, tuple(stride), tuple(padding))


def _is_onednn(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler chooses its own kernels, and knows no shapes of this one
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class CausalConv3d(nn.Conv3d):
    """A convolution over frames, rows and columns whose output sees no later frame: odd kernel, stride 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.num_past, self.border = kernel[0] - 1, (kernel[1] // 2, kernel[2] // 2)

    def forward(self, x: Tensor, cache: Cache | None = None, spare: Tensor | None = None) -> Tensor:
        """`b c t h w` to `b c_out t h w`; into the memory of `spare`, which nobody needs any more, where it fits.

        Large new tensors cost more than the arithmetic on them: the system hands out their memory page by page.
        """
        is_start = cache is None or self not in cache
        num_frames = x.shape[2]
        if cache is not None and self.num_past:
            x = cache.extend(self, x, self.num_past)
        if self.num_past == 0 or (is_start and num_frames == 1):  # an image: all other taps would see zeros
            return convolve(x, self.weight[:, :, -1:], self.bias, (1, 1, 1), (0, *self.border))
        if self.num_past == 2 and _is_onednn(x) and winograd.is_worthwhile(x, num_frames - is_start):
            return self._filter(x, is_start, spare)
        if is_start and _is_onednn(x) and num_frames >= WASTEFUL_FRAMES:
            return convolve(x, self.weight, self.bias, (1, 1, 1), (self.num_past, *self.border))[:, :, :num_frames]
        if is_start:
            x = torch.cat([torch.zeros_like(x[:, :, : self.num_past]), x], dim=2)
        return convolve(x, self.weight, self.bias, (1, 1, 1), (0, *self.border))

    def _filter(self, x: Tensor, is_start: bool, spare: Tensor | None) -> Tensor:
        """The valid convolution over time; at the start the first frame, which sees nothing else, stands alone."""
        frames = x.movedim(1, -1).unbind(1)  # t of b h w c
        num_frames = len(frames) if is_start else len(frames) - self.num_past
        shape = (x.shape[0], num_frames, *x.shape[3:], self.out_channels)
        y = None if spare is None else spare.movedim(1, -1)
        if y is None or y.shape != shape or not y.is_contiguous():
            y = x.new_empty(shape)
        out = [None] * num_frames if torch.is_grad_enabled() else y.unbind(1)
        if is_start:
            first = self._convolve_frame(frames[0], self.weight[:, :, -1], self.bias)
            frames, out = (torch.zeros_like(frames[0]), *frames), out[1:]
        outputs = winograd.filter_frames(frames, self.weight, self.bias, self._convolve_frame, out)
        if torch.is_grad_enabled():
            y = torch.stack([first, *outputs] if is_start else outputs, dim=1)
        elif is_start:
            y[:, 0] = first
        return y.movedim(-1, 1)

    def _convolve_frame(self, frame: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(frame.movedim(-1, 1), kernel, bias, (1, 1), self.border).movedim(1, -1)


class FrameConv2d(nn.Conv2d):
    """A 2-D convolution of every frame of a video, without moving frames into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        """`b c t h w` to `b c_out t h' w'`."""
        return convolve(x, self.weight.unsqueeze(2), self.bias, (1, *self.stride), (0, *self.padding))


def is_frame_by_frame(x: Tensor) -> bool:
    """Whether what happens to each frame alone is best done to one after the other, `x` b c t h w.

    On a CPU what a frame needs on the way stays in the caches then, and its memory is used again for the next one.
    """
    return _is_onednn(x) and not torch.is_grad_enabled()


class DownsampleConv2d(FrameConv2d):
    """A 3 x 3 convolution that halves rows and columns, with zeros below and to the right."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`b c t h w` to `b c_out t h/2 w/2`."""
        if is_frame_by_frame(x):
            return torch.cat([super(DownsampleConv2d, self).forward(_pad(frame)) for frame in x.split(1, dim=2)], dim=2)
        return super().forward(_pad(x))


def _pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 0, 1))


class UpsampleConv2d(FrameConv2d):
    """Rows and columns doubled by repeating them, then a 3 x 3 convolution, in one.

    Two of the three taps fall on the same pixel, so each of the four output pixels of an input pixel is a 2 x 2
    convolution of the input: 16 multiplications instead of 36, and the doubled input is never made.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`b c t h w` to `b c_out t 2h 2w`."""
        weight, bias = self._phases()
        if not is_frame_by_frame(x):
            x = convolve(x, weight.unsqueeze(2), bias, (1, 1, 1), (0, 1, 1))  # b (p q c_out) t h+1 w+1
            x = rearrange(x.movedim(1, -1), "b t h w (p q c) -> b t (h p) (w q) c", p=2, q=2)
            return x[:, :, 1:-1, 1:-1].movedim(-1, 1)
        batch, _, num_frames, height, width = x.shape
        y = x.new_empty(batch, num_frames, 2 * height, 2 * width, self.out_channels)
        for frame, out in zip(x.unbind(2), y.unbind(1), strict=True):
            pixels = convolve(frame, weight, bias, (1, 1), (1, 1)).movedim(1, -1)  # b h+1 w+1 (p q c_out)
            for (p, q), phase in zip(product((0, 1), repeat=2), pixels.chunk(4, dim=-1), strict=True):
                out[:, 1 - p :: 2, 1 - q :: 2] = phase[:, 1 - p :, 1 - q :][:, :height, :width]
        return y.movedim(-1, 1)

    def _phases(self) -> tuple[Tensor, Tensor | None]:
        """Kernel, (p q c_out) c 2 2, and bias of the four output pixels of an input pixel."""
        # second pixel of a pair first: out of the borders' pairs one pixel each is then cut off
        pairs = self.weight.new_tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])  # phase, tap of 2, tap of 3
        weight = torch.einsum("p a i, q b j, o c i j -> p q o c a b", pairs, pairs, self.weight).flatten(0, 2)
        return weight, None if self.bias is None else self.bias.repeat(4)
