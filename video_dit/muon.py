"""Muon: momentum whose updates of matrices are made orthogonal, so that every direction learns at the same rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan et al., "Muon", 2024)
NUM_ITERATIONS = 5


class Matrix(NamedTuple):
    """A weight of a linear map between hidden layers, and how many maps are stacked in its rows (3 in a fused QKV)."""

    parameter: nn.Parameter
    num_fused: int


class Peers(Protocol):
    """What the optimizer needs of the processes that train together."""

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """The value added up over all processes."""


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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; for matrices between hidden layers (embeddings and vectors want AdamW).

    Shards are put together by one sum over the processes, each process orthogonalises its share of the matrices, a
    second sum hands the results round. An update has spectral norm lr * sqrt(max(1, rows / columns)); weight decay is
    decoupled.

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices; each has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = group["params"]
            updates = self._orthogonal(self._directions(parameters, group["momentum"]), group["num_fused"], parameters)
            weights = [local(parameter) for parameter in parameters]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])

    def _directions(self, parameters: list[nn.Parameter], momentum: float) -> Tensor:
        """This process's rows of what is to be made orthogonal, k rows columns."""
        for parameter in parameters:
            self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters)
        averages = [local(self.state[parameter]["average"]) for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch.stack(torch._foreach_lerp(gradients, averages, momentum))

    def _orthogonal(self, shards: Tensor, num_fused: int, parameters: list[nn.Parameter]) -> list[Tensor]:
        """This process's rows of the scaled updates."""
        mine, whole = slice(None), shards
        if hasattr(parameters[0], "to_local"):
            rows = parameters[0].shape[0]
            start = min(rows, self.world.rank * -(-rows // self.world.size))
            mine = slice(start, start + shards.shape[1])
            whole = shards.new_zeros(len(parameters), *parameters[0].shape)
            whole[:, mine] = shards
            whole = self.world.sum(whole)
        maps = rearrange(whole, "k (f rows) columns -> (k f) rows columns", f=num_fused)
        share = slice(self.world.rank, None, self.world.size)
        updates = torch.zeros_like(maps)
        updates[share] = orthogonalize(maps[share]) * max(1.0, maps.shape[1] / maps.shape[2]) ** 0.5
        updates = self.world.sum(updates)
        return list(rearrange(updates, "(k f) rows columns -> k (f rows) columns", f=num_fused)[:, mine])
