"""What is done to a model so that many processes can train it; the model itself knows nothing of it."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard parameters, gradients and optimizer state over the mesh (FSDP2, arXiv 2304.11277), in place.

    Each child of a ModuleList named `blocks` is gathered and freed on its own; the rest is one group.
    """
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
