"""LoRA: trained here, read by diffusers, and the other way round."""

import diffusers
import pytest
import torch

from video_dit.key_tables import DIFFUSERS_DIT
from video_dit.lora import LORA_FILE, LoraConfig, add_lora, merge_lora, published_lora, save_lora
from video_dit.model import VideoDiT
from video_dit.packing import pack

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "num_layers": 2, "text_dim": 8}
CONFIG = LoraConfig(rank=3, alpha=6, mlp=True)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(**SIZES, freq_dim=16)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "transformer")
    return tmp_path


def adapted(folder):
    """Our model with adapters that change something."""
    model = VideoDiT.from_pretrained(str(folder))
    add_lora(model, CONFIG)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def inputs():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(16, 3, 4, 6, generator=generator), torch.randn(5, 8, generator=generator)


@torch.no_grad()
def ours(model):
    latents, text = inputs()
    packed = pack([latents], [500.0], [text])
    return packed.unpack(model(packed))[0]


@torch.no_grad()
def theirs(model):
    latents, text = inputs()
    return model(latents[None], torch.tensor([500.0]), text[None], return_dict=False)[0][0]


def test_new_adapters_change_nothing_and_are_all_that_is_trained(folder):
    model, plain = VideoDiT.from_pretrained(str(folder)), VideoDiT.from_pretrained(str(folder))
    add_lora(model, LoraConfig(rank=2))
    assert torch.equal(ours(model), ours(plain))
    trained = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 5  # blocks, A and B, linear maps of attention
    assert sum(shape.numel() for shape in trained.values()) == 2 * 2 * (5 * 24 + 72 + 48 + 24 * 3)


def test_diffusers_computes_the_same_with_the_saved_adapters(folder):
    model = adapted(folder)
    save_lora(published_lora(model.state_dict(), DIFFUSERS_DIT), CONFIG, str(folder))
    peer = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    plain = theirs(peer)
    peer.load_lora_adapter(str(folder), weight_name=LORA_FILE)
    assert (theirs(peer) - ours(model)).abs().max() < 1e-4
    assert (theirs(peer) - plain).abs().max() > 0.1
    merged = VideoDiT.from_pretrained(str(folder))
    merge_lora(merged, str(folder))
    assert (ours(merged) - ours(model)).abs().max() < 1e-5


def test_half_of_a_merge_twice_is_the_whole(folder):
    model = adapted(folder)
    save_lora(published_lora(model.state_dict(), DIFFUSERS_DIT), CONFIG, str(folder))
    twice = VideoDiT.from_pretrained(str(folder))
    for _ in range(2):
        merge_lora(twice, f"{folder}/{LORA_FILE}", strength=0.5)
    assert (ours(twice) - ours(model)).abs().max() < 1e-5


def test_adapters_of_diffusers_are_merged(folder, tmp_path):
    """Each of q, k and v with an A of its own, and some maps without any."""
    import peft

    peer = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    peer.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v", "ffn.net.0.proj"]))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    peer.save_lora_adapter(tmp_path / "theirs", weight_name=LORA_FILE)
    model = VideoDiT.from_pretrained(str(folder))
    merge_lora(model, str(tmp_path / "theirs"))
    assert (ours(model) - theirs(peer)).abs().max() < 1e-4


def test_files_that_do_not_fit_are_named(folder, tmp_path):
    model = VideoDiT.from_pretrained(str(folder))
    name = "transformer.blocks.0.attn1.to_q"
    cases = {
        "no LoRA tensor": {"transformer.blocks.0.attn1.to_q.weight": torch.zeros(2, 2)},
        "lacks lora_B": {f"{name}.lora_A.weight": torch.zeros(2, 24)},
        r"the model's \(24, 24\)": {
            f"{name}.lora_A.weight": torch.zeros(2, 9),
            f"{name}.lora_B.weight": torch.zeros(24, 2),
        },
        "the model has no blocks.7.attn1.to_q": {
            f"{name.replace('0', '7')}.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"
        },
    }
    for message, tensors in cases.items():
        save_lora(tensors, CONFIG, str(tmp_path / "bad"))
        with pytest.raises(ValueError, match=message):
            merge_lora(model, str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="rank=0"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="alpha=-1"):
        LoraConfig(alpha=-1)
