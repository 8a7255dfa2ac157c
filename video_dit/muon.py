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


class Gathering(Protocol):
    """What the optimizer needs of the processes that train together."""

    def whole(self, value: Tensor) -> Tensor:
        """A tensor that may be sharded, as a plain one."""

    def shard(self, value: Tensor, like: Tensor) -> Tensor:
        """A plain tensor, equal on all processes, sharded like another one."""


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

    Every process makes the whole update and keeps its shard. An update has spectral norm
    lr * sqrt(max(1, rows / columns)); weight decay is decoupled.

    Args:
        matrices: equal shapes are computed together.
        lr, momentum, weight_decay: as in every optimizer.
        world: the processes.
    """

    def __init__(
        self, matrices: Sequence[Matrix], *, lr: float, momentum: float, weight_decay: float, world: Gathering
    ) -> None:
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for parameter, num_fused in matrices:
            group = groups.setdefault((parameter.shape, num_fused), {"params": [], "num_fused": num_fused})
            group["params"].append(parameter)
        self.world = world
        super().__init__(groups.values(), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient; all of a shape have one, or none."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
        whole = self.world.whole(torch.stack(directions))  # k (f rows) columns
        maps = rearrange(whole, "k (f rows) columns -> (k f) rows columns", f=group["num_fused"])
        scale = max(1.0, maps.shape[1] / maps.shape[2]) ** 0.5
        updates = rearrange(orthogonalize(maps), "(k f) rows columns -> k (f rows) columns", f=group["num_fused"])
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(self.world.shard(update, parameter), alpha=-group["lr"] * scale)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "average" not in state:
            state["average"] = torch.zeros_like(parameter)
        average: Tensor = state["average"]
        average.mul_(momentum).add_(parameter.grad, alpha=1 - momentum)
        return parameter.grad * (1 - momentum) + average * momentum
