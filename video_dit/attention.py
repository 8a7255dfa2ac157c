"""Attention over packed sequences, the one swappable operation of the transformer.

A pack lays the tokens of many samples one behind the other. Attention stays inside each sample: a segment of queries
sees its own segment of keys and nothing else. `attend` computes it with one of these backends:

    sdpa        one call for each run of equal segments; any device and dtype
    varlen      one call for the whole pack: torch's variable-length FlashAttention 2; CUDA, 16-bit
    fa3, fa4    the same through FlashAttention 3 (Hopper) or 4 (Hopper, Blackwell); installed beside torch
    xformers    one call for the whole pack: memory-efficient attention; CUDA, 16- and 32-bit
    auto        the first of varlen, xformers and sdpa that takes the tensors
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
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
        """Group equal neighbours. A segment may have no queries (its keys are then seen by nobody).

        Raises:
            ValueError: the two lists differ in length, or a segment has queries and no keys.
        """
        runs: list[Run] = []
        for q_length, k_length in zip(q_lengths, k_lengths, strict=True):
            if q_length and not k_length:
                raise ValueError(f"a segment of {q_length} queries has no keys: softmax needs at least one")
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


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """Softmax attention inside each segment, scaled by 1/sqrt(e).

    Args:
        q: queries, n heads e.
        k: keys, m heads e.
        v: values, m heads e.
        segments: how n and m are cut.
        backend: a name from the table on top of this module.

    Returns:
        n heads e.

    Raises:
        ValueError: the segments do not add up to n and m, or the backend is unknown, not installed or not made for
            these tensors.
    """
    _check_name(backend)
    _check_lengths(q, k, v, segments)
    if not all(run.q_length for run in segments.runs):
        k, v, segments = _without_unseen(k, v, segments)
    if not segments.runs:
        return q * k[:1] * v[:1]  # empty, and still a function of all three: other processes may wait for the gradients
    if backend == "auto":
        backend = next(name for name in ("varlen", "xformers", "sdpa") if not _obstacle(name, q))
    elif obstacle := _obstacle(backend, q):
        raise ValueError(f"attention backend {backend!r} {obstacle}; 'auto' takes what fits")
    return _KERNELS[backend](q, k, v, segments)


def attention_backend(name: str) -> Attend:
    """`attend` with the backend of that name. Device and dtype are checked when it is called.

    The first call of "fa3" or "fa4" switches FlashAttention for the whole process, since torch has no narrower switch.

    Raises:
        ValueError: the name is unknown, or what the backend needs is not installed.
    """
    _check_name(name)
    if obstacle := _not_installed(name):
        raise ValueError(f"attention backend {name!r} {obstacle}")
    return functools.partial(attend, backend=name)


def _check_name(name: str) -> None:
    names = sorted([*_KERNELS, "auto"])
    if name not in names:
        raise ValueError(f"attention backend {name!r} is unknown: use one of {', '.join(names)}")


def _check_lengths(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    num_queries = sum(run.repeats * run.q_length for run in segments.runs)
    num_keys = sum(run.repeats * run.k_length for run in segments.runs)
    if (q.shape[0], k.shape[0], v.shape[0]) != (num_queries, num_keys, num_keys):
        raise ValueError(
            f"{q.shape[0]} queries, {k.shape[0]} keys and {v.shape[0]} values for segments of {num_queries} queries "
            f"and {num_keys} keys"
        )


def _without_unseen(k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Segments]:
    """Leave out the segments without queries, and their keys and values."""
    seen = tuple(run for run in segments.runs if run.q_length)
    if not seen:
        return k, v, Segments(())
    lengths = [run.repeats * run.k_length for run in segments.runs]

    def keep(x: Tensor) -> Tensor:
        return torch.cat([part for part, run in zip(x.split(lengths), segments.runs, strict=True) if run.q_length])

    return keep(k), keep(v), Segments(seen)


# --- what can be used -----------------------------------------------------------------------------------------------


def _obstacle(name: str, q: Tensor) -> str | None:
    """Why a backend cannot take such tensors here; None if it can."""
    if name == "sdpa":
        return None
    misfit = _xformers_misfit(q) if name == "xformers" else _flash_misfit(q)
    return misfit or _not_installed(name)


def _flash_misfit(q: Tensor) -> str | None:
    """Why the FlashAttention in torch cannot take such tensors; None if it can."""
    if not q.is_cuda:
        return f"needs CUDA tensors, not {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"needs a head width that is a multiple of 8 and at most 256, not {q.shape[-1]}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {torch.cuda.get_device_name(q.device)}"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"needs a torch that was built with FlashAttention, not {torch.__version__}"
    return None


def _xformers_misfit(q: Tensor) -> str | None:
    """Why xformers cannot take such tensors; None if it can."""
    if not q.is_cuda:
        return f"needs CUDA tensors, not {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, not {q.dtype}"
    if q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more for bfloat16, not {torch.cuda.get_device_name(q.device)}"
    if q.shape[-1] * q.element_size() % 16:
        return f"needs a head width of whole 16-byte units, not {q.shape[-1]} of {q.dtype}"
    return None


@functools.cache
def _not_installed(name: str) -> str | None:
    """What to install before a backend can be used; None if it is all there."""
    for module, source in _REQUIRED.get(name, ()):
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: a shared library is not there
            return f"needs {source} ({error})"
    return None


_VARLEN = ("torch.nn.attention.varlen", "torch>=2.11")
_REQUIRED: Mapping[str, Sequence[tuple[str, str]]] = {
    "varlen": [_VARLEN],
    "fa3": [_VARLEN, ("flash_attn_interface", "FlashAttention 3: build it from hopper/ of its repository")],
    "fa4": [_VARLEN, ("flash_attn.cute.interface", "FlashAttention 4: pip install flash-attn-4")],
    "xformers": [("xformers.ops", "xformers: pip install 'kinoray[cuda]'")],
}


# --- kernels: every segment has queries -----------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    # FlashAttention by name where it fits, since cuDNN, which torch may prefer, plans anew for each new length
    attention = F.scaled_dot_product_attention if _flash_misfit(q) else _flash
    if len(segments.runs) == 1:
        return _batched(attention, q, k, v, segments.runs[0])
    # split, not slices: its backward is one concatenation instead of a full-size zero tensor a slice
    q_runs = q.split([run.repeats * run.q_length for run in segments.runs])
    k_runs = k.split([run.repeats * run.k_length for run in segments.runs])
    v_runs = v.split([run.repeats * run.k_length for run in segments.runs])
    return torch.cat([_batched(attention, *run) for run in zip(q_runs, k_runs, v_runs, segments.runs, strict=True)])


def _batched(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, run: Run
) -> Tensor:
    q = q.unflatten(0, (run.repeats, run.q_length)).transpose(1, 2)  # b heads n e; views: half the time of einops
    k = k.unflatten(0, (run.repeats, run.k_length)).transpose(1, 2)  # b heads m e
    v = v.unflatten(0, (run.repeats, run.k_length)).transpose(1, 2)  # b heads m e
    return attention(q, k, v).transpose(1, 2).flatten(0, 1)  # (b n) heads e


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, implementation: str | None = None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # here, since it imports the whole of torch's compiler

    if implementation and nn.attention.current_flash_attention_impl() != implementation:
        nn.attention.activate_flash_attention_impl(implementation)
    q_offsets, k_offsets = _offsets(segments, q.device)
    longest = max(run.q_length for run in segments.runs), max(run.k_length for run in segments.runs)
    return cast(Tensor, varlen_attn(q, k, v, q_offsets, k_offsets, *longest))


def _xformers(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal_mask(segments, q.device)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]  # 1 n heads e -> n heads e


# The blocks of a model ask for the same few again and again: made once, kept while they are in use. Never inference
# tensors: whoever trains after sampling must be able to save them for a backward pass.


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _offsets(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    """First query and first key of each segment and, last, their number: int32, num_segments + 1 each."""
    # a plain copy waits, so the cached tensor is good on every stream
    lengths = torch.tensor([segments.q_lengths, segments.k_lengths])
    q_offsets, k_offsets = F.pad(lengths.cumsum(1), (1, 0)).to(device, torch.int32)
    return q_offsets, k_offsets


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _block_diagonal_mask(segments: Segments, device: torch.device) -> object:
    """xformers' form of the same."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(segments.q_lengths, segments.k_lengths, device=device)


_KERNELS: Mapping[str, Attend] = {
    "sdpa": _sdpa,
    "varlen": _varlen,
    "fa3": functools.partial(_varlen, implementation="FA3"),
    "fa4": functools.partial(_varlen, implementation="FA4"),
    "xformers": _xformers,
}
