"""Random numbers that depend on what they are for, not on who draws them or when.

A key such as (seed, step, clip id) names a stream. So a sample's noise is the same with any number of workers, after a
restart, and on any device, and there is no generator state to save.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_normal(shape: tuple[int, ...] | torch.Size, *key: int | str) -> Tensor:
    """Standard normal float32 numbers; drawn on the CPU so that every device sees the same ones."""
    return torch.randn(shape, generator=keyed_generator(*key))


def keyed_uniform(*key: int | str) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=keyed_generator(*key)))
