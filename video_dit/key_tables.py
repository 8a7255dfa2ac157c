"""Names of tensors and config fields in published checkpoints, and how they map to ours, both ways.

Several of their tensors may be rows of one of ours, in order (a fused QKV). `{n}` is a block's number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

DIFFUSERS_DIT, ORIGINAL_DIT, DIFFUSERS_VAE = "WanTransformer3DModel", "WanModel", "AutoencoderKLWan"

# Published class -> our module -> their modules; what no row names is called the same.
KEY_TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    DIFFUSERS_VAE: {},
    DIFFUSERS_DIT: {
        "time_mlp.0": ("condition_embedder.time_embedder.linear_1",),
        "time_mlp.2": ("condition_embedder.time_embedder.linear_2",),
        "time_modulation": ("condition_embedder.time_proj",),
        "text_mlp.0": ("condition_embedder.text_embedder.linear_1",),
        "text_mlp.2": ("condition_embedder.text_embedder.linear_2",),
        "blocks.{n}.modulation": ("blocks.{n}.scale_shift_table",),
        "blocks.{n}.self_attention.qkv": tuple(f"blocks.{{n}}.attn1.to_{part}" for part in "qkv"),
        "blocks.{n}.self_attention.norm_q": ("blocks.{n}.attn1.norm_q",),
        "blocks.{n}.self_attention.norm_k": ("blocks.{n}.attn1.norm_k",),
        "blocks.{n}.self_attention.out": ("blocks.{n}.attn1.to_out.0",),
        "blocks.{n}.cross_attention.q": ("blocks.{n}.attn2.to_q",),
        "blocks.{n}.cross_attention.kv": tuple(f"blocks.{{n}}.attn2.to_{part}" for part in "kv"),
        "blocks.{n}.cross_attention.norm_q": ("blocks.{n}.attn2.norm_q",),
        "blocks.{n}.cross_attention.norm_k": ("blocks.{n}.attn2.norm_k",),
        "blocks.{n}.cross_attention.out": ("blocks.{n}.attn2.to_out.0",),
        "blocks.{n}.norm_cross": ("blocks.{n}.norm2",),
        "blocks.{n}.mlp.0": ("blocks.{n}.ffn.net.0.proj",),
        "blocks.{n}.mlp.2": ("blocks.{n}.ffn.net.2",),
        "head.modulation": ("scale_shift_table",),
        "head.out": ("proj_out",),
    },
    ORIGINAL_DIT: {  # as in Wan's own repository
        "time_mlp": ("time_embedding",),
        "time_modulation": ("time_projection.1",),
        "text_mlp": ("text_embedding",),
        "blocks.{n}.self_attention.qkv": tuple(f"blocks.{{n}}.self_attn.{part}" for part in "qkv"),
        "blocks.{n}.self_attention.out": ("blocks.{n}.self_attn.o",),
        "blocks.{n}.self_attention": ("blocks.{n}.self_attn",),
        "blocks.{n}.cross_attention.kv": tuple(f"blocks.{{n}}.cross_attn.{part}" for part in "kv"),
        "blocks.{n}.cross_attention.out": ("blocks.{n}.cross_attn.o",),
        "blocks.{n}.cross_attention": ("blocks.{n}.cross_attn",),
        "blocks.{n}.norm_cross": ("blocks.{n}.norm3",),
        "blocks.{n}.mlp": ("blocks.{n}.ffn",),
        "head.out": ("head.head",),
    },
}


def published_names(key: str, class_name: str) -> tuple[str, ...]:
    """The published tensors that make up our tensor `key`; itself where no row of the table applies."""
    number = re.match(r"blocks\.(\d+)\.", key)
    generic = re.sub(r"^blocks\.\d+\.", "blocks.{n}.", key)
    for ours, theirs in KEY_TABLES[class_name].items():
        if generic == ours or generic.startswith(ours + "."):
            suffix = generic[len(ours) :]
            return tuple((name + suffix).replace("{n}", number[1] if number else "") for name in theirs)
    return (key,)


def to_published(state: Mapping[str, Tensor], class_name: str) -> dict[str, Tensor]:
    """Our state dict under the published names; parts of fused tensors are views."""
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        names = published_names(key, class_name)
        published.update(zip(names, value.chunk(len(names)), strict=True))
    return published


def match_published(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Tensor], class_name: str
) -> dict[str, tuple[str, ...]]:
    """Which published tensors make up each of ours.

    Args:
        shapes: of the published tensors, by name.
        expected: our state dict; only names and shapes are looked at (meta tensors do).
        class_name: a key of KEY_TABLES.

    Raises:
        ValueError: listing every missing, unexpected and mis-shaped tensor.
    """
    sources = {key: published_names(key, class_name) for key in expected}
    wanted: dict[str, tuple[int, ...]] = {}
    for key, names in sources.items():
        rest = expected[key].shape
        wanted.update(dict.fromkeys(names, (rest[0] // len(names), *rest[1:]) if len(names) > 1 else tuple(rest)))
    misshaped = [
        f"{name} {tuple(shapes[name])} instead of {shape}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    missing, unexpected = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        raise ValueError(f"the weights do not fit {class_name} with this config; " + "; ".join(problems))
    return sources


def translate_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A published config.json in the field names of diffusers, which are ours; `_class_name` and the like are left out.

    Raises:
        ValueError: an original checkpoint of a kind that is not known.
    """
    if values.get("_class_name") != ORIGINAL_DIT:
        return {key: value for key, value in values.items() if not key.startswith("_")}
    kind = values.get("model_type", "t2v")
    if kind not in ("t2v", "ti2v"):
        raise ValueError(f"model_type={kind!r}: only 't2v' and 'ti2v' checkpoints are known")
    return {
        "num_attention_heads": values["num_heads"],
        "attention_head_dim": values["dim"] // values["num_heads"],
        "in_channels": values["in_dim"],
        "out_channels": values["out_dim"],
        "ffn_dim": values["ffn_dim"],
        "num_layers": values["num_layers"],
        **{key: values[key] for key in ("freq_dim", "text_dim", "eps", "patch_size") if key in values},
    }
