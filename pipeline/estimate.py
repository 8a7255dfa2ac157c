"""What a training run will need, before it starts: memory, hours, disk. From the model's own code, run on no data."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipeline.train_video import TrainVideoConfig
from video_dit.attention import Segments
from video_dit.flops import TRAINING_FACTOR, forward_flops, peak_flops
from video_dit.layers import CrossAttention, SelfAttention
from video_dit.model import VideoDiT
from video_dit.packing import pack
from video_dit.parallel.activation_checkpointing import Checkpointing, checkpoint_block
from video_dit.shapes import LatentShape

WEIGHT_BYTES = 4  # master weights, their average, gradients and each moment are float32
TEXT_TOKENS = 128  # of a caption, where none is known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run's needs.

    Attributes:
        num_parameters: of the transformer.
        num_trained: of which are trained.
        state_bytes: of weights, average, gradients and moments, on each GPU.
        gathered_bytes: of the weights that are whole on a GPU at a time: those of one block, two while it is fetched
            ahead.
        activation_bytes: kept for the backward pass of one pack.
        checkpoint_bytes: on disk, all shards of one checkpoint.
        tokens_per_step, flops_per_step: of all GPUs; model operations, without what checkpointing computes again.
        step_s, hours: at `utilisation` of the GPU's peak; None for a GPU that is not known.
        num_steps: of the run.
    """

    num_parameters: int
    num_trained: int
    state_bytes: float
    gathered_bytes: float
    activation_bytes: float
    checkpoint_bytes: float
    tokens_per_step: int
    flops_per_step: float
    step_s: float | None
    hours: float | None
    num_steps: int

    @property
    def memory_bytes(self) -> float:
        """Of each GPU, in all."""
        return self.state_bytes + self.gathered_bytes + self.activation_bytes


def estimate(
    config: TrainVideoConfig,
    *,
    num_gpus: int,
    gpu: str,
    clip: LatentShape,
    checkpointing: Checkpointing = "none",
    utilisation: float = 0.4,
) -> Estimate:
    """What a run of a config needs.

    Args:
        config: with sizes of the transformer, not `start`.
        num_gpus: that share the run.
        gpu: a name that `peak_flops` knows.
        clip: latent frames, rows and columns of a typical clip; packs are full of them.
        checkpointing: of activations.
        utilisation: share of the peak that steps reach; the best published trainings of such models reach 0.33.
    """
    with torch.device("meta"):
        model = VideoDiT(config.dit)
    num_tokens = clip.grid(config.dit.patch).num_tokens
    per_pack = max(1, config.plan.token_budget // num_tokens)
    lengths, texts = [num_tokens] * per_pack, [TEXT_TOKENS] * per_pack
    step_flops = TRAINING_FACTOR * config.plan.packs_per_step * forward_flops(config.dit, lengths, texts)
    peak = peak_flops(gpu)
    step_s = step_flops / (num_gpus * utilisation * peak) if peak else None
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    moments = _moments(model, config)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    width = 2 if config.precision == "bf16" else 4
    state = WEIGHT_BYTES * (3 * num_parameters + moments)
    return Estimate(
        num_parameters=num_parameters,
        num_trained=num_parameters,
        state_bytes=state / num_gpus,
        gathered_bytes=2 * block * width,
        activation_bytes=activation_bytes(model, clip, per_pack, checkpointing, config.precision == "bf16"),
        checkpoint_bytes=WEIGHT_BYTES * (2 * num_parameters + moments),
        tokens_per_step=config.plan.packs_per_step * sum(lengths),
        flops_per_step=step_flops,
        step_s=step_s,
        hours=None if step_s is None else step_s * config.optimizer.num_steps / 3600,
        num_steps=config.optimizer.num_steps,
    )


def _moments(model: VideoDiT, config: TrainVideoConfig) -> int:
    """Numbers that the optimizers keep: two a weight of AdamW, one of Muon."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    if config.optimizer.matrix_learning_rate is None:
        return 2 * everything
    return 2 * everything - sum(matrix.parameter.numel() for matrix in model.hidden_matrices())


class _Attention(torch.autograd.Function):
    """Keeps what the fused kernels keep, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """n heads e each."""
        del segments
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out


def activation_bytes(
    model: VideoDiT, clip: LatentShape, num_clips: int, checkpointing: Checkpointing, is_bf16: bool
) -> float:
    """What autograd keeps of a forward pass: counted while the model runs on tensors without data.

    The model is changed: its blocks checkpoint their activations.
    """
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.attend = _Attention.apply
    for block in model.blocks:
        checkpoint_block(block, checkpointing)
    kept: dict[int, int] = {}
    own = {id(parameter) for parameter in model.parameters()}

    def keep(value: Tensor) -> Tensor:
        if id(value) not in own and not isinstance(value, torch.nn.Parameter) and value._base is None:
            kept[id(value)] = value.untyped_storage().nbytes()
            alive.append(value)
        elif value._base is not None and id(value._base) not in own:
            kept[id(value._base)] = value._base.untyped_storage().nbytes()
            alive.append(value._base)
        return value

    alive: list[Tensor] = []  # so that no id is used twice
    config = model.config
    latents = [torch.empty(config.in_channels, *clip)] * num_clips
    texts = [torch.empty(TEXT_TOKENS, config.text_dim)] * num_clips
    packed = pack(latents, [500.0] * num_clips, texts, config.patch).to("meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(packed)
    attention = 0.0
    if checkpointing == "selective":  # kept where no hook sees it
        attention = len(model.blocks) * 2 * packed.num_tokens * config.dim * dtype.itemsize
    return sum(kept.values()) + attention
