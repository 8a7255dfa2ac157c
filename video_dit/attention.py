"""Attention over packed sequences, the one swappable operation of the transformer.

A pack lays the tokens of many samples one behind the other. Attention stays inside each sample: a segment of queries
sees its own segment of keys and nothing else. Neighbouring segments of equal lengths are computed as one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


class Run(NamedTuple):
    """`repeats` neighbouring segments of the same lengths."""

    repeats: int
    q_length: int
    k_length: int


class Segments(NamedTuple):
    """Which queries see which keys: segment i of the queries sees segment i of the keys."""

    runs: tuple[Run, ...]

    @classmethod
    def of(cls, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Segments:
        """Group equal neighbours.

        Raises:
            ValueError: the two lists differ in length.
        """
        runs: list[Run] = []
        for q_length, k_length in zip(q_lengths, k_lengths, strict=True):
            if runs and (runs[-1].q_length, runs[-1].k_length) == (q_length, k_length):
                runs[-1] = runs[-1]._replace(repeats=runs[-1].repeats + 1)
            else:
                runs.append(Run(1, q_length, k_length))
        return cls(tuple(runs))

    @property
    def q_lengths(self) -> list[int]:
        """Queries of each segment."""
        return [run.q_length for run in self.runs for _ in range(run.repeats)]

    @property
    def k_lengths(self) -> list[int]:
        """Keys of each segment."""
        return [run.k_length for run in self.runs for _ in range(run.repeats)]

    def of_queries(self, start: int, stop: int) -> Segments:
        """Queries start, ..., stop - 1 alone, against all keys; a segment without any of them keeps its keys."""
        ends = list(itertools.accumulate(self.q_lengths))
        own = [
            max(0, min(stop, end) - max(start, end - length)) for end, length in zip(ends, self.q_lengths, strict=True)
        ]
        return Segments.of(own, self.k_lengths)


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Softmax attention inside each segment, scaled by 1/sqrt(e).

    Args:
        q: queries, n heads e.
        k: keys, m heads e.
        v: values, m heads e.
        segments: how n and m are cut; lengths add up to n and m.

    Returns:
        n heads e.
    """
    # split, not slices: its backward is one concatenation instead of a full-size zero tensor a slice
    q_runs = q.split([run.repeats * run.q_length for run in segments.runs])
    k_runs = k.split([run.repeats * run.k_length for run in segments.runs])
    v_runs = v.split([run.repeats * run.k_length for run in segments.runs])
    outputs = []
    for run, q_run, k_run, v_run in zip(segments.runs, q_runs, k_runs, v_runs, strict=True):
        batch = [rearrange(x, "(b n) heads e -> b heads n e", b=run.repeats) for x in (q_run, k_run, v_run)]
        outputs.append(rearrange(F.scaled_dot_product_attention(*batch), "b heads n e -> (b n) heads e"))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
