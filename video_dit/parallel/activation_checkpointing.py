"""Activation checkpointing: blocks that forget what they computed and compute it again in the backward pass."""

from __future__ import annotations

import functools
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

Checkpointing = Literal["none", "block", "selective"]

# What "selective" keeps: the results that cost most for their size. Of an attention, one n d tensor and its log-sums.
KEPT = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_efficient_attention_forward",  # xformers' as well
        "torch_attn::_varlen_attn",
        "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
        # Ulysses' messages, four n d of this process's tokens; an all-gather, of the whole pack's keys, is done again.
        "_c10d_functional::all_to_all_single",
    }
)


def checkpoint_block(block: nn.Module, form: Checkpointing) -> None:
    """Checkpoint a block's forward pass, in place.

    Args:
        block: anything without randomness.
        form: "block" keeps the inputs alone; "selective" also what attention returned.
    """
    if form == "none":
        return
    selective = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    block.forward = functools.partial(
        checkpoint,
        block.forward,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=selective if form == "selective" else noop_context_fn,
    )


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
