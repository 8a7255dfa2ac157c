"""Context parallelism: one pack over several processes, each with a run of its tokens (`PackedBatch.shard`).

Only self-attention needs the others' tokens, so only its `attend` is replaced; packs that are whole on a process are
attended to as ever. Two forms:
    ulysses      tokens are exchanged for heads and back (arXiv 2309.14509): each process attends with its share of the
                 heads over the whole pack. Equal work for all; the heads must divide.
    all_gather   keys and values of the whole pack come to every process, which attends with its own queries.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from video_dit.attention import Attend, Segments
from video_dit.packing import shard_lengths

ContextForm = Literal["auto", "ulysses", "all_gather"]


def use_context_parallel(model: Any, mesh: DeviceMesh, form: ContextForm) -> None:
    """Let the self-attention of all blocks work on shards of packs, in place.

    Args:
        model: a VideoDiT, its attention backend already chosen.
        mesh: one axis, over the processes that share a pack.
        form: "auto" takes "ulysses" where the heads divide and "all_gather" elsewhere.

    Raises:
        ValueError: "ulysses" with heads that do not divide.
    """
    group, size = mesh.get_group(), mesh.size()
    heads = model.config.num_attention_heads
    if form == "ulysses" and heads % size:
        raise ValueError(f"context_form='ulysses': {heads} heads do not divide over {size} processes, use 'all_gather'")
    context_attention: Any = AllGatherAttention if form == "all_gather" or heads % size else UlyssesAttention
    for block in model.blocks:
        block.self_attention.attend = context_attention(block.self_attention.attend, group)


@dataclasses.dataclass(frozen=True)
class UlyssesAttention:
    """Stands for `attend` of the whole pack: q, k, v and the result are of this process's tokens, n heads e."""

    attend: Attend
    group: dist.ProcessGroup

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """The arguments of `attend`, with the segments of the whole pack."""
        if is_whole(q, segments, self.group):
            return self.attend(q, k, v, segments)
        size = self.group.size()
        lengths = shard_lengths(sum(segments.q_lengths), size)
        own = [q.shape[0]] * size
        parts = [rearrange(x, "n (ranks heads) e -> ranks n heads e", ranks=size) for x in (q, k, v)]
        sent = torch.stack(parts, dim=2).flatten(0, 1)  # (ranks n) 3 heads e
        q, k, v = exchange(sent, own, lengths, self.group).unbind(1)  # whole n, own heads, e each
        y = exchange(self.attend(q, k, v, segments), lengths, own, self.group)  # (ranks n) heads e
        return rearrange(y, "(ranks n) heads e -> n (ranks heads) e", ranks=size)


@dataclasses.dataclass(frozen=True)
class AllGatherAttention:
    """Stands for `attend` of the whole pack: q, k, v and the result are of this process's tokens, n heads e."""

    attend: Attend
    group: dist.ProcessGroup

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """The arguments of `attend`, with the segments of the whole pack."""
        if is_whole(q, segments, self.group):
            return self.attend(q, k, v, segments)
        both = gather_tokens(torch.stack([k, v], dim=1), sum(segments.q_lengths), self.group)  # whole n, 2 heads e
        k, v = both.unbind(1)
        return self.attend(q, k, v, _own_queries(segments, self.group.rank(), self.group.size()))


def is_whole(q: Tensor, segments: Segments, group: dist.ProcessGroup) -> bool:
    """Whether a process has all tokens of the pack, though it could share them."""
    return group.size() > 1 and q.shape[0] == sum(segments.q_lengths)


@functools.lru_cache(maxsize=64)  # the same for all blocks
def _own_queries(segments: Segments, rank: int, size: int) -> Segments:
    lengths = shard_lengths(sum(segments.q_lengths), size)
    return segments.of_queries(sum(lengths[:rank]), sum(lengths[: rank + 1]))


def exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `sent[i]` rows to process i and receive `received[i]` from it, in order; gradients go the way back."""
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), received, sent, group))


def gather_tokens(x: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """The rows of all shards on every process: predictions of a whole pack, for instance.

    Args:
        x: of this process's tokens, n in front.
        num_tokens: of the whole pack.
        group: the processes that share it.

    Returns:
        as x, with the whole pack's tokens in front. Gradients are added up over the processes.
    """
    lengths = shard_lengths(num_tokens, group.size())
    longest = max(lengths)
    padded = F.pad(x, (0, 0) * (x.ndim - 1) + (0, longest - x.shape[0]))  # equal messages
    rows = collectives.wait_tensor(collectives.all_gather_single(padded, 0, group))
    if min(lengths) == longest:
        return rows
    return torch.cat([part[:length] for part, length in zip(rows.split(longest), lengths, strict=True)])
