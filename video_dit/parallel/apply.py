"""What is done to a model so that many processes can train it; the model itself knows nothing of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from video_dit.parallel.activation_checkpointing import Checkpointing, checkpoint_block
from video_dit.parallel.block_compile import compile_blocks
from video_dit.parallel.context import ContextForm, use_context_parallel

Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over processes and made to fit. None of it changes the result, but for bf16's rounding.

    Attributes:
        context_size: processes that share each pack, a divisor of all; for clips that are too long for one.
        context_form: how their attention communicates, see `video_dit.parallel.context`.
        activation_checkpointing: what the backward pass computes again: nothing, whole blocks, or blocks but for what
            attention returned.
        compile: whether blocks are compiled.
        precision: of weights and activations in the blocks; master weights, gradients' sums, norms, gates and the path
            of the timesteps are float32 always.
        min_group: a block with at least as many parameters is gathered and freed on its own: below, the messages cost
            more than the memory is worth.
    """

    context_size: int = 1
    context_form: ContextForm = "auto"
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False
    precision: Precision = "fp32"
    min_group: int = 1 << 20

    def __post_init__(self) -> None:
        if self.context_size < 1:
            raise ValueError(f"context_size={self.context_size}: must be at least 1")
        for name, values in (
            ("context_form", ContextForm),
            ("activation_checkpointing", Checkpointing),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(values):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(values))}")


def parallelize(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> nn.Module:
    """Prepare a model for training, in place; its parameters are sharded over all processes (FSDP2, arXiv 2304.11277).

    Args:
        model: on the mesh's device, equal in all processes. Its ModuleList `blocks`, if it has one, is what is done
            block by block.
        mesh: axes "replica", "data" and "context", see `DistributedWorld`.
        config: how.

    Raises:
        ValueError: the mesh's context axis has another size, or the model lacks what the config works on.
    """
    blocks = list(getattr(model, "blocks", []))
    _check(model, blocks, mesh["context"].size(), config)
    if config.context_size > 1:
        use_context_parallel(model, mesh["context"], config.context_form)
    if config.compile:
        compile_blocks(blocks)
    for block in blocks:  # around the compiled code: attention, outside of it, is what a checkpoint may keep
        checkpoint_block(block, config.activation_checkpointing)
    _shard(model, blocks, _sharding_mesh(mesh), config)
    return model


def _check(model: nn.Module, blocks: list[nn.Module], context_size: int, config: ParallelConfig) -> None:
    name = type(model).__name__
    if config.context_size != context_size:
        raise ValueError(f"context_size={config.context_size}: the mesh has {context_size}, must be equal")
    for field in ("context_size", "activation_checkpointing", "compile"):
        value = getattr(config, field)
        if not blocks and value != getattr(ParallelConfig, field):
            raise ValueError(f"{field}={value!r}: {name} has no blocks, must be {getattr(ParallelConfig, field)!r}")
    if config.precision == "bf16" and not hasattr(model, "float32_modules"):
        raise ValueError(f"precision='bf16': {name} does not tell its float32_modules, must be 'fp32'")


def _sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """One axis to shard over, behind one to copy over if there are copies."""
    if mesh["replica"].size() == 1:
        return mesh._flatten("shard")
    mesh["data", "context"]._flatten("shard")
    return mesh["replica", "shard"]


def _shard(model: Any, blocks: list[nn.Module], mesh: DeviceMesh, config: ParallelConfig) -> None:
    policy = MixedPrecisionPolicy()
    if config.precision == "bf16":
        # inputs are cast by the model: what it gives its blocks in float32 stays so
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard([getattr(model, name) for name in model.float32_modules], mesh=mesh)
    for block in blocks:
        if sum(parameter.numel() for parameter in block.parameters()) >= config.min_group:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
