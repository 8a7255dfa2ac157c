"""torch.compile, block by block, for packs whose lengths and segments differ in every step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from video_dit.attention import Attend, Segments


class Unguarded:
    """Segments that the compiler carries but does not look into: it would compile anew for each pack's."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile the blocks' forward passes for any lengths, in place; all blocks share the code.

    Attention itself stays as it is, outside of the graphs: its kernels are written by hand, and which of them run is
    decided by the segments. Lengths of one (one token, one frame) get code of their own, once.
    """
    outside = functools.cache(_outside)  # one function for all blocks, since the compiler tells them by identity
    for block in blocks:
        for module in block.modules():
            if hasattr(module, "attend"):
                module.attend = outside(module.attend)
        block.forward = _unguarded(torch.compile(block.forward, dynamic=True))


def _outside(attend: Attend) -> Any:
    @torch.compiler.disable
    def attend_outside(q: Tensor, k: Tensor, v: Tensor, segments: Unguarded) -> Tensor:
        return attend(q, k, v, segments.segments)

    return attend_outside


def _unguarded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward_unguarded(*args: Any) -> Tensor:
        return forward(*(Unguarded(value) if isinstance(value, Segments) else value for value in args))

    return forward_unguarded
