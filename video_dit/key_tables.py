"""Names of tensors in published checkpoints, and how they map to ours, both ways.

Several of their tensors may be rows of one of ours, in order (a fused QKV). `{n}` is a block's number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

DIFFUSERS_DIT, ORIGINAL_DIT = "WanTransformer3DModel", "WanModel"
DIFFUSERS_VAE, ORIGINAL_VAE, ORIGINAL_RESIDUAL_VAE = "AutoencoderKLWan", "Wan2.1_VAE", "Wan2.2_VAE"
LATENT_CLASSIFIER = "LatentClassifier"  # our own, nobody else's

# The original VAEs' modules, ours -> theirs. Theirs are numbered in one row: 2 residual blocks and a resampling a
# stage of the encoder, 3 and one of the decoder; in 2.2 each stage has its own row.
_VAE_ENDS = {
    **{
        f"{half}.{ours}": f"{half}.{theirs}"
        for half in ("encoder", "decoder")
        for ours, theirs in (
            ("conv_in", "conv1"),
            ("mid_block.resnets.0", "middle.0"),
            ("mid_block.attentions.0", "middle.1"),
            ("mid_block.resnets.1", "middle.2"),
            ("norm_out", "head.0"),
            ("conv_out", "head.2"),
        )
    },
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
}
_VAE_MODULES = {
    ORIGINAL_VAE: {
        **_VAE_ENDS,
        **{f"encoder.down_blocks.{n}": f"encoder.downsamples.{n}" for n in range(11)},
        **{f"decoder.up_blocks.{n}.resnets.{m}": f"decoder.upsamples.{4 * n + m}" for n in range(4) for m in range(3)},
        **{f"decoder.up_blocks.{n}.upsamplers.0": f"decoder.upsamples.{4 * n + 3}" for n in range(3)},
    },
    ORIGINAL_RESIDUAL_VAE: {
        **_VAE_ENDS,
        **{
            f"{half}.{way}_blocks.{n}.resnets.{m}": f"{half}.{way}samples.{n}.{way}samples.{m}"
            for half, way, num_blocks in (("encoder", "down", 2), ("decoder", "up", 3))
            for n in range(4)
            for m in range(num_blocks)
        },
        **{f"encoder.down_blocks.{n}.downsampler": f"encoder.downsamples.{n}.downsamples.2" for n in range(3)},
        **{f"decoder.up_blocks.{n}.upsampler": f"decoder.upsamples.{n}.upsamples.3" for n in range(3)},
    },
}
_RESIDUAL_PARTS = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}

# Published class -> our module -> their modules; what no row names is called the same.
KEY_TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    DIFFUSERS_VAE: {},
    LATENT_CLASSIFIER: {},
    DIFFUSERS_DIT: {
        "time_mlp.0": ("condition_embedder.time_embedder.linear_1",),
        "time_mlp.2": ("condition_embedder.time_embedder.linear_2",),
        "time_modulation": ("condition_embedder.time_proj",),
        "text_mlp.0": ("condition_embedder.text_embedder.linear_1",),
        "text_mlp.2": ("condition_embedder.text_embedder.linear_2",),
        "image_embedding.positions": ("condition_embedder.image_embedder.pos_embed",),
        "image_embedding.mlp.0": ("condition_embedder.image_embedder.norm1",),
        "image_embedding.mlp.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
        "image_embedding.mlp.3": ("condition_embedder.image_embedder.ff.net.2",),
        "image_embedding.mlp.4": ("condition_embedder.image_embedder.norm2",),
        "blocks.{n}.modulation": ("blocks.{n}.scale_shift_table",),
        "blocks.{n}.self_attention.qkv": tuple(f"blocks.{{n}}.attn1.to_{part}" for part in "qkv"),
        "blocks.{n}.self_attention.norm_q": ("blocks.{n}.attn1.norm_q",),
        "blocks.{n}.self_attention.norm_k": ("blocks.{n}.attn1.norm_k",),
        "blocks.{n}.self_attention.out": ("blocks.{n}.attn1.to_out.0",),
        "blocks.{n}.cross_attention.q": ("blocks.{n}.attn2.to_q",),
        "blocks.{n}.cross_attention.kv": tuple(f"blocks.{{n}}.attn2.to_{part}" for part in "kv"),
        "blocks.{n}.cross_attention.norm_q": ("blocks.{n}.attn2.norm_q",),
        "blocks.{n}.cross_attention.norm_k": ("blocks.{n}.attn2.norm_k",),
        "blocks.{n}.cross_attention.image_kv": tuple(f"blocks.{{n}}.attn2.add_{part}_proj" for part in "kv"),
        "blocks.{n}.cross_attention.norm_image_k": ("blocks.{n}.attn2.norm_added_k",),
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
        "image_embedding.positions": ("img_emb.emb_pos",),
        "image_embedding.mlp": ("img_emb.proj",),
        "blocks.{n}.self_attention.qkv": tuple(f"blocks.{{n}}.self_attn.{part}" for part in "qkv"),
        "blocks.{n}.self_attention.out": ("blocks.{n}.self_attn.o",),
        "blocks.{n}.self_attention": ("blocks.{n}.self_attn",),
        "blocks.{n}.cross_attention.kv": tuple(f"blocks.{{n}}.cross_attn.{part}" for part in "kv"),
        "blocks.{n}.cross_attention.image_kv": tuple(f"blocks.{{n}}.cross_attn.{part}_img" for part in "kv"),
        "blocks.{n}.cross_attention.norm_image_k": ("blocks.{n}.cross_attn.norm_k_img",),
        "blocks.{n}.cross_attention.out": ("blocks.{n}.cross_attn.o",),
        "blocks.{n}.cross_attention": ("blocks.{n}.cross_attn",),
        "blocks.{n}.norm_cross": ("blocks.{n}.norm3",),
        "blocks.{n}.mlp": ("blocks.{n}.ffn",),
        "head.out": ("head.head",),
    },
    **{
        class_name: {
            **{f"{ours}.{part}": (f"{theirs}.{name}",) for ours, theirs in modules.items() for part, name in parts},
            **{ours: (theirs,) for ours, theirs in modules.items()},
        }
        for parts in [_RESIDUAL_PARTS.items()]
        for class_name, modules in _VAE_MODULES.items()
    },
}

# Published tensors that no model uses: diffusers' first conversions of the image-to-video models carry them along.
UNUSED = {DIFFUSERS_DIT: re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")}


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

    Returns:
        the names of the tensors, in order, that each of ours is made of.

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
    unused = UNUSED.get(class_name)
    missing = sorted(wanted.keys() - shapes.keys())
    unexpected = sorted(name for name in shapes.keys() - wanted.keys() if not (unused and unused.fullmatch(name)))
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        raise ValueError(f"the weights do not fit {class_name} with this config; " + "; ".join(problems))
    return sources
