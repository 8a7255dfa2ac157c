"""Floating-point operations of the transformer, counted as its mathematics has them (a multiply-add is two)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from video_dit.model_config import VideoDiTConfig

TRAINING_FACTOR = 3  # forward, and gradients of activations and of weights

# Dense bf16 operations a second, as the makers' data sheets have them.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def forward_flops(config: VideoDiTConfig, lengths: Sequence[int], text_lengths: Sequence[int]) -> float:
    """Of the blocks, for a pack: linear maps of video and text tokens, and attention within each sample.

    Args:
        config: sizes.
        lengths: video tokens of each sample.
        text_lengths: text tokens of each sample.
    """
    dim, ffn = config.dim, config.ffn_dim
    tokens, texts = sum(lengths), sum(text_lengths)
    linear = 2 * tokens * (4 * dim**2 + 2 * dim * ffn)  # self-attention and MLP
    linear += 2 * tokens * 2 * dim**2 + 2 * texts * 2 * dim**2  # cross-attention: queries and output, keys and values
    attention = 4 * dim * sum(n * (n + s) for n, s in zip(lengths, text_lengths, strict=True))
    return float(config.num_layers * (linear + attention))


def peak_flops(name: str) -> float | None:
    """Of a GPU by its name; None for one that is not known."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def measured_peak(size: int = 512, rounds: int = 5) -> float:
    """Of this process on the CPU: the fastest of some products of float32 matrices."""
    a, b = torch.randn(2, size, size)
    best_s = float("inf")
    for _ in range(rounds + 1):
        start_s = time.perf_counter()
        a @ b
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s
