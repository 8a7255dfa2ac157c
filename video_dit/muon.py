"""Muon: momentum whose updates of matrices are made orthogonal, so that every direction learns at the same rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan et al., "Muon", 2024)
NUM_ITERATIONS = 5
BUCKET_BYTES = 1 << 28  # of matrices that a process holds whole at a time, and once more their updates


class Matrix(NamedTuple):
    """A weight of a linear map between hidden layers, and how many maps are stacked in its rows (3 in a fused QKV).

    A convolution's kernel, out in t h w, is a map from the values it sees: out (in t h w).
    """

    parameter: nn.Parameter
    num_fused: int


class Peers(Protocol):
    """What the optimizer needs of the processes that train together."""

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """The value added up over all processes; in place where it is on the processes' device."""


def local(value: Tensor) -> Tensor:
    """This process's shard (of a tensor cut into equal runs of rows, FSDP's way); of a plain tensor, itself."""
    shard: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return shard


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values come out between 0.7 and 1.2.

    Args:
        matrices: k rows columns; in bfloat16 on accelerators, in float32 on CPUs, where bfloat16 is slow.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)  # the largest singular value below 1
    x = x if x.device.type == "cpu" else x.bfloat16()
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class Stack(NamedTuple):
    """Matrices of one shape that are updated together."""

    group: dict[str, Any]  # of the optimizer
    parameters: list[nn.Parameter]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Matrices, rows, columns: a kernel's rows are its outputs."""
        rows = self.parameters[0].shape[0]
        return len(self.parameters), rows, self.parameters[0].numel() // rows


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; for matrices between hidden layers (embeddings and vectors want AdamW).

    BUCKET_BYTES of matrices at a time, their shards are put together by one sum over the processes, each process
    orthogonalises its share, and a second sum hands the results round. An update has spectral norm
    lr * sqrt(max(1, rows / columns)); weight decay is decoupled.

    Args:
        matrices: equal shapes are computed together.
        lr, momentum, weight_decay: as in every optimizer.
        world: the processes.
    """

    def __init__(
        self, matrices: Sequence[Matrix], *, lr: float, momentum: float, weight_decay: float, world: Peers
    ) -> None:
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for parameter, num_fused in matrices:
            group = groups.setdefault((parameter.shape, num_fused), {"params": [], "num_fused": num_fused})
            group["params"].append(parameter)
        self.world = world
        super().__init__(groups.values(), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["average"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient, the same ones on every process."""
        assert closure is None
        for bucket in self._buckets():
            updates = self._orthogonal(bucket, self._gather(bucket))
            for (group, parameters), own in zip(bucket, updates, strict=True):
                weights = [local(parameter) for parameter in parameters]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                shaped = [update.reshape(weight.shape) for update, weight in zip(own, weights, strict=True)]
                torch._foreach_add_(weights, shaped, alpha=-group["lr"])

    def _buckets(self) -> Iterator[list[Stack]]:
        """Stacks of all matrices, as many at a time as BUCKET_BYTES hold, and at least one matrix."""
        bucket: list[Stack] = []
        free = BUCKET_BYTES
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            while parameters:
                fit = free // parameters[0].nbytes
                if fit == 0 and bucket:
                    yield bucket
                    bucket, free = [], BUCKET_BYTES
                    continue
                taken, parameters = parameters[: max(1, fit)], parameters[max(1, fit) :]
                bucket.append(Stack(group, taken))
                free -= len(taken) * taken[0].nbytes
        if bucket:
            yield bucket

    def _gather(self, bucket: list[Stack]) -> list[Tensor]:
        """What is to be made orthogonal: whole matrices of each stack, k rows columns."""
        shards = [self._directions(stack) for stack in bucket]
        if not hasattr(bucket[0].parameters[0], "to_local"):
            return shards
        flat, whole = _flat([stack.shape for stack in bucket], shards[0])
        for stack, matrices, shard in zip(bucket, whole, shards, strict=True):
            matrices[:, self._mine(stack)] = shard
        self.world.sum(flat)
        return whole

    def _directions(self, stack: Stack) -> Tensor:
        """This process's rows of a stack's directions, k rows columns."""
        gradients = [local(parameter.grad) for parameter in stack.parameters if parameter.grad is not None]
        averages = [local(self.state[parameter]["average"]) for parameter in stack.parameters]
        momentum = stack.group["momentum"]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch.stack(torch._foreach_lerp(gradients, averages, momentum)).flatten(2)

    def _orthogonal(self, bucket: list[Stack], whole: list[Tensor]) -> list[Tensor]:
        """This process's rows of the scaled updates of each stack."""
        flat, updates = _flat([stack.shape for stack in bucket], whole[0])
        first = self.world.rank  # of the maps that this process makes orthogonal, every world.size-th of all
        for stack, matrices, update in zip(bucket, whole, updates, strict=True):
            cut = {"f": stack.group["num_fused"]}
            maps = rearrange(matrices, "k (f rows) columns -> (k f) rows columns", **cut)
            results = rearrange(update, "k (f rows) columns -> k f rows columns", **cut).flatten(0, 1)
            share = slice(first % self.world.size, None, self.world.size)
            if len(maps[share]):
                results[share] = orthogonalize(maps[share]) * max(1.0, maps.shape[1] / maps.shape[2]) ** 0.5
            first -= len(maps)
        self.world.sum(flat)
        return [update[:, self._mine(stack)] for stack, update in zip(bucket, updates, strict=True)]

    def _mine(self, stack: Stack) -> slice:
        """This process's rows of a stack's matrices."""
        parameter = stack.parameters[0]
        if not hasattr(parameter, "to_local"):
            return slice(None)
        rows = parameter.shape[0]
        start = min(rows, self.world.rank * -(-rows // self.world.size))
        return slice(start, start + len(local(parameter)))


def _flat(shapes: Sequence[tuple[int, int, int]], like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Zeros in one piece, and views of it in these shapes."""
    flat = like.new_zeros(sum(map(math.prod, shapes)))
    parts = flat.split([math.prod(shape) for shape in shapes])
    return flat, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
