"""What a published checkpoint is: the class by its tensors' names, the config by config.json or their shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from video_dit.key_tables import (
    DIFFUSERS_DIT,
    DIFFUSERS_VAE,
    ORIGINAL_DIT,
    ORIGINAL_RESIDUAL_VAE,
    ORIGINAL_VAE,
    published_names,
)

UNREAD = ("clip_output",)  # a field of Wan 2.2's published VAE config that no model has ever had
HEAD_DIM = 128  # of every published Wan transformer; no tensor's shape tells it

# Fields of an original transformer's config.json -> diffusers'.
ORIGINAL_FIELDS = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
}

# A tensor that only this class has.
MARKS = {
    DIFFUSERS_DIT: "condition_embedder.time_proj.weight",
    ORIGINAL_DIT: "time_projection.1.weight",
    DIFFUSERS_VAE: "decoder.up_blocks.0.resnets.0.conv1.weight",
    ORIGINAL_VAE: "decoder.upsamples.0.residual.2.weight",
    ORIGINAL_RESIDUAL_VAE: "decoder.upsamples.0.upsamples.0.residual.2.weight",
}

# Configs of the VAEs whose own repositories have no config.json, as in diffusers' one.
VAE_CONFIGS: dict[str, dict[str, Any]] = {
    ORIGINAL_VAE: {},  # our defaults
    ORIGINAL_RESIDUAL_VAE: {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": (
            *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
            *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
            *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
            *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
            *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
            *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        ),
        "latents_std": (
            *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
            *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
            *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
            *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
            *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
            *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
        ),
    },
}


def recognize(names: Collection[str]) -> str:
    """The class, a key of KEY_TABLES, of a checkpoint with these tensors.

    Raises:
        ValueError: none that is known.
    """
    for class_name, mark in MARKS.items():
        if mark in names:
            return class_name
    some = ", ".join(sorted(names)[:3])
    raise ValueError(f"{len(names)} tensors ({some}, ...) are no checkpoint of {', '.join(MARKS)}")


def config_from_shapes(
    shapes: Mapping[str, Sequence[int]], class_name: str, num_attention_heads: int | None = None
) -> dict[str, Any]:
    """The config of a transformer, in the field names of diffusers; only `eps` is left at its default.

    Args:
        shapes: of the checkpoint's tensors, by published name.
        class_name: a transformer's, of KEY_TABLES.
        num_attention_heads: None for heads of Wan's width, 128.

    Raises:
        ValueError: a width that is no multiple of 128 without `num_attention_heads`, or a tensor that is needed is not
            there.
    """

    def shape(key: str) -> Sequence[int]:
        return shapes.get(published_names(key, class_name)[0], ())

    needed = (
        "patch_embedding.weight",
        "head.out.bias",
        "text_mlp.0.weight",
        "time_mlp.0.weight",
        "blocks.0.mlp.0.bias",
    )
    for key in needed:
        if not shape(key):
            raise ValueError(f"no tensor {published_names(key, class_name)[0]} to tell the sizes of {class_name} by")
    dim, in_channels, *patch_size = shape("patch_embedding.weight")
    if num_attention_heads is None and dim % HEAD_DIM:
        raise ValueError(f"width {dim} is no multiple of {HEAD_DIM}, Wan's heads: give {class_name}'s config.json")
    heads = num_attention_heads or dim // HEAD_DIM
    image_dim = next(iter(shape("image_embedding.mlp.0.weight")), None)
    positions = shape("image_embedding.positions")
    return {
        "patch_size": tuple(patch_size),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": shape("head.out.bias")[0] // math.prod(patch_size),
        "text_dim": shape("text_mlp.0.weight")[1],
        "freq_dim": shape("time_mlp.0.weight")[1],
        "ffn_dim": shape("blocks.0.mlp.0.bias")[0],
        "num_layers": next(n for n in itertools.count() if not shape(f"blocks.{n}.modulation")),
        "cross_attn_norm": bool(shape("blocks.0.norm_cross.weight")),
        "image_dim": image_dim,
        "added_kv_proj_dim": None if image_dim is None else dim,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


def default_config(class_name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The config of a published checkpoint that comes without a config.json.

    Raises:
        ValueError: the tensors do not tell it.
    """
    if class_name in VAE_CONFIGS:
        return VAE_CONFIGS[class_name]
    if class_name == DIFFUSERS_VAE:
        raise ValueError(f"the tensors of {class_name} do not tell how latents are normalised: give its config.json")
    return config_from_shapes(shapes, class_name)


def translate_config(values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A published config.json in the field names of diffusers, which are ours; `_class_name` and the like are left out.

    Args:
        values: of config.json.
        shapes: of the tensors beside it. Wan's own config.json says "i2v" of models that see CLIP's tokens (2.1) and of
            models that do not (2.2): only the tensors tell. Other classes need none.

    Raises:
        ValueError: an original checkpoint of a kind that is not known, or a field that is not there.
    """
    if values.get("_class_name") != ORIGINAL_DIT:
        return {key: value for key, value in values.items() if not key.startswith("_") and key not in UNREAD}
    kind, known = values.get("model_type", "t2v"), ("t2v", "ti2v", "i2v", "flf2v")
    if kind not in known:
        raise ValueError(f"model_type={kind!r}: known are {', '.join(known)}")
    missing = [key for key in ("num_heads", *ORIGINAL_FIELDS) if key not in values]
    if missing:
        raise ValueError(f"config.json of {ORIGINAL_DIT}: no {', '.join(missing)}")
    return {
        **config_from_shapes(shapes, ORIGINAL_DIT, values["num_heads"]),
        **{ours: values[key] for key, ours in ORIGINAL_FIELDS.items()},
        **{key: values[key] for key in ("freq_dim", "text_dim", "eps", "patch_size") if key in values},
    }
