"""Published names and configs: every tensor of every known layout is mapped, both ways, and configs follow."""

import re

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

from video_dit.key_tables import (
    DIFFUSERS_DIT,
    DIFFUSERS_VAE,
    KEY_TABLES,
    LATENT_CLASSIFIER,
    ORIGINAL_DIT,
    ORIGINAL_RESIDUAL_VAE,
    ORIGINAL_VAE,
    match_published,
    to_published,
)
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.published import VAE_CONFIGS, config_from_shapes, default_config, recognize, translate_config
from video_dit.vae import VideoVAE, VideoVAEConfig

WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_I2V = {**WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
WAN = {  # published: what differs from our defaults, which are those of 2.1 1.3B; parameters; tensors
    "2.1 1.3B": ({}, 1_418_996_800, 825),
    "2.1 14B": (WAN_14B, 14_288_491_584, 1095),
    "2.1 I2V-14B": (WAN_I2V, 16_394_878_784, 1303),
    "2.1 FLF2V-14B": ({**WAN_I2V, "pos_embed_seq_len": 514}, 16_395_536_704, 1304),
    "2.2 I2V-A14B": ({**WAN_14B, "in_channels": 36}, 14_288_901_184, 1095),
    "2.2 TI2V-5B": (
        {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        4_999_787_712,
        825,
    ),
}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 2}
SMALL_FLF2V = {**SMALL, "in_channels": 36, "image_dim": 10, "added_kv_proj_dim": 24, "pos_embed_seq_len": 6}
VAES = {  # parameters, tensors
    ORIGINAL_VAE: (126_892_531, 194),
    ORIGINAL_RESIDUAL_VAE: (704_688_668, 196),
}


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def numbered(state):
    """The same names and shapes on the CPU, every tensor with a value of its own."""
    return {name: torch.full(value.shape, float(i)) for i, (name, value) in enumerate(state.items())}


@pytest.mark.parametrize("name", WAN)
def test_published_transformers_map_every_tensor_both_ways(name):
    fields, num_parameters, num_tensors = WAN[name]
    config = VideoDiTConfig(**fields)
    ours = on_meta(VideoDiT, config)
    with torch.device("meta"):
        peer_fields = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, **fields}
        theirs = diffusers.WanTransformer3DModel(**peer_fields)
    published = to_published(ours.state_dict(), DIFFUSERS_DIT)
    assert shapes_of(published) == shapes_of(theirs.state_dict())
    for count in (sum(value.numel() for value in state.values()) for state in (ours.state_dict(), theirs.state_dict())):
        assert count == num_parameters
    assert len(published) == num_tensors
    for class_name in (DIFFUSERS_DIT, ORIGINAL_DIT):
        published = to_published(ours.state_dict(), class_name)
        sources = match_published(shapes_of(published), ours.state_dict(), class_name)
        assert sorted(name for names in sources.values() for name in names) == sorted(published)
        assert recognize(published) == class_name
        assert VideoDiTConfig(**config_from_shapes(shapes_of(published), class_name)) == config


def test_original_transformer_names_are_the_ones_that_diffusers_converts():
    state = numbered(VideoDiT(VideoDiTConfig(**SMALL_FLF2V)).state_dict())
    original = to_published(state, ORIGINAL_DIT)
    assert {"blocks.1.cross_attn.norm_k.weight", "blocks.1.cross_attn.norm_k_img.weight"} <= original.keys()
    converted = convert_wan_transformer_to_diffusers(dict(original))
    # the table of diffusers' script has this one, its loader of single files does not
    converted["condition_embedder.image_embedder.pos_embed"] = converted.pop("img_emb.emb_pos")
    expected = to_published(state, DIFFUSERS_DIT)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())


def residual_vae_to_diffusers(name):
    """The rules of diffusers' conversion script for Wan 2.2's VAE, read backwards from its names."""
    place = re.match(r"(encoder|decoder)\.(?:down|up)samples\.(\d)\.(down|up)samples\.(\d)\.", name)
    if place:
        half, stage, way, block = place.groups()
        inner = f"{way}sampler" if re.search(r"\.(resample|time_conv)\.", name) else f"resnets.{block}"
        name = f"{half}.{way}_blocks.{stage}.{inner}.{name[place.end() :]}"
    for theirs, ours in (
        ("residual.0", "norm1"),
        ("residual.2", "conv1"),
        ("residual.3", "norm2"),
        ("residual.6", "conv2"),
        (".shortcut", ".conv_shortcut"),
        ("middle.0", "mid_block.resnets.0"),
        ("middle.1", "mid_block.attentions.0"),
        ("middle.2", "mid_block.resnets.1"),
        ("head.0", "norm_out"),
        ("head.2", "conv_out"),
        ("coder.conv1", "coder.conv_in"),
    ):
        name = name.replace(theirs, ours)
    return re.sub(r"^conv2\.", "post_quant_conv.", re.sub(r"^conv1\.", "quant_conv.", name))


@pytest.mark.parametrize("class_name", VAES)
def test_published_vaes_map_every_tensor_both_ways(class_name):
    config = VideoVAEConfig(**VAE_CONFIGS[class_name])
    ours = on_meta(VideoVAE, config).state_dict()
    assert (sum(value.numel() for value in ours.values()), len(ours)) == VAES[class_name]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**VAE_CONFIGS[class_name]).state_dict()
    assert shapes_of(to_published(ours, DIFFUSERS_VAE)) == shapes_of(theirs)
    original = to_published(ours, class_name)
    assert recognize(original) == class_name
    assert len(original) == len(ours)
    sources = match_published(shapes_of(original), ours, class_name)
    assert sources.keys() == ours.keys()
    assert {name for names in sources.values() for name in names} == original.keys()


@pytest.mark.parametrize("class_name", VAES)
def test_original_vae_names_are_the_ones_that_diffusers_converts(class_name):
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    form = residual if class_name == ORIGINAL_RESIDUAL_VAE else {}
    state = numbered(on_meta(VideoVAE, VideoVAEConfig(base_dim=8, **form)).state_dict())
    original = to_published(state, class_name)
    if class_name == ORIGINAL_VAE:
        converted = convert_wan_vae_to_diffusers(dict(original))
    else:
        converted = {residual_vae_to_diffusers(name): value for name, value in original.items()}
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], value) for name, value in state.items())


def test_a_published_tensor_that_no_model_uses_is_passed_over_and_no_other():
    state = on_meta(VideoDiT, VideoDiTConfig(**SMALL_FLF2V)).state_dict()
    shapes = shapes_of(to_published(state, DIFFUSERS_DIT))
    shapes["blocks.1.attn2.norm_added_q.weight"] = (24,)
    match_published(shapes, state, DIFFUSERS_DIT)
    shapes["blocks.1.attn1.norm_added_q.weight"] = (24,)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.1\.attn1\.norm_added_q\.weight$"):
        match_published(shapes, state, DIFFUSERS_DIT)


@pytest.mark.parametrize(("kind", "name"), [("t2v", "2.1 14B"), ("i2v", "2.1 I2V-14B"), ("i2v", "2.2 I2V-A14B")])
def test_original_configs_of_one_kind_differ_in_what_the_tensors_say(kind, name):
    config = VideoDiTConfig(**WAN[name][0])
    shapes = shapes_of(to_published(on_meta(VideoDiT, config).state_dict(), ORIGINAL_DIT))
    values = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": kind, "text_len": 512}
    values |= {"dim": 5120, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256, "in_dim": config.in_channels}
    values |= {"num_heads": 40, "num_layers": 40, "out_dim": 16}
    assert VideoDiTConfig(**translate_config(values, shapes)) == config
    with pytest.raises(ValueError, match="model_type='s2v': known are t2v, ti2v, i2v, flf2v"):
        translate_config({**values, "model_type": "s2v"}, shapes)
    del values["num_heads"]
    with pytest.raises(ValueError, match="no num_heads"):
        translate_config(values, shapes)


def test_the_config_of_wan_22s_vae_as_it_is_published():
    values = VAE_CONFIGS[ORIGINAL_RESIDUAL_VAE]
    published = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0", "clip_output": False, **values}
    assert translate_config(published, {}) == values


def test_what_shapes_cannot_tell_is_an_error():
    state = on_meta(VideoDiT, VideoDiTConfig(**SMALL_FLF2V)).state_dict()
    shapes = shapes_of(to_published(state, ORIGINAL_DIT))
    with pytest.raises(ValueError, match="width 24 is no multiple of 128"):
        config_from_shapes(shapes, ORIGINAL_DIT)
    found = VideoDiTConfig(**config_from_shapes(shapes, ORIGINAL_DIT, num_attention_heads=2))
    assert found == VideoDiTConfig(**SMALL_FLF2V)
    del shapes["patch_embedding.weight"]
    with pytest.raises(ValueError, match=r"no tensor patch_embedding\.weight"):
        config_from_shapes(shapes, ORIGINAL_DIT)
    with pytest.raises(ValueError, match=r"AutoencoderKLWan do not tell .*: give its config\.json"):
        default_config(DIFFUSERS_VAE, {})
    with pytest.raises(ValueError, match=r"2 tensors \(a, b, ...\) are no checkpoint of"):
        recognize(["b", "a"])
    published = {DIFFUSERS_DIT, ORIGINAL_DIT, DIFFUSERS_VAE, ORIGINAL_VAE, ORIGINAL_RESIDUAL_VAE}
    assert set(KEY_TABLES) == {*published, LATENT_CLASSIFIER}
