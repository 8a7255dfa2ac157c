"""What is done to a model so that many processes can train it; the model itself knows nothing of it."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def parallelize(model: nn.Module, mesh: DeviceMesh, min_group: int = 1 << 20) -> nn.Module:
    """Shard parameters, gradients and optimizer state over the mesh (FSDP2, arXiv 2304.11277), in place.

    Each child of a ModuleList named `blocks` is gathered and freed on its own if it has at least `min_group`
    parameters: below, the messages cost more than the memory is worth. The rest is one group.
    """
    for block in getattr(model, "blocks", []):
        if sum(parameter.numel() for parameter in block.parameters()) >= min_group:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
