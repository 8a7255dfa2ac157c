"""The processes that train together, through torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from video_dit.parallel.failpoints import reach


@contextlib.contextmanager
def group_of_torchrun() -> Iterator[None]:
    """Inside, this process is in the default group of those that torchrun started."""
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


class DistributedWorld:
    """All processes of the default group, which somebody (Ray Train, torchrun, a test) has set up.

    Args:
        device_type: "cuda" or "cpu".
        context_size: neighbouring processes that share each pack.
        num_replicas: copies of the model, each sharded over as many processes (HSDP): within a node, say.

    Attributes:
        rank, size: of this process, among all.
        mesh: axes "replica", the copies; "data", the groups of a copy that have packs of their own; and "context", the
            processes of a group.

    Raises:
        ValueError: context_size and num_replicas do not divide the processes.
    """

    def __init__(self, device_type: str, context_size: int = 1, num_replicas: int = 1) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        for name, value in (("context_size", context_size), ("num_replicas", num_replicas)):
            if self.size % value:
                raise ValueError(f"{name}={value}: must divide the {self.size} processes")
        if self.size % (context_size * num_replicas):
            raise ValueError(
                f"context_size={context_size} times num_replicas={num_replicas}: must divide the {self.size} processes"
            )
        self.mesh: DeviceMesh = init_device_mesh(
            device_type,
            (num_replicas, self.size // (context_size * num_replicas), context_size),
            mesh_dim_names=("replica", "data", "context"),
        )

    def sum(self, value: Tensor) -> Tensor:
        """The value added up over all processes."""
        value = value.to(self.mesh.device_type)
        reach("mid_allreduce")
        dist.all_reduce(value)
        return value

    def whole(self, value: Tensor) -> Tensor:
        """A sharded tensor gathered on every process; a plain one as it is."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.all_reduce(torch.zeros((), device=self.mesh.device_type))

    def gather_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A sharded state dict as plain CPU tensors; every process must call it."""
        return {name: self.whole(value).cpu() for name, value in state.items()}
