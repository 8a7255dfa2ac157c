"""VideoDiT against diffusers' WanTransformer3DModel, and its own promises about packing."""

import diffusers
import pytest
import torch

from video_dit import weights
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import pack, patchify, unpatchify
from video_dit.shapes import LatentShape, Stride
from video_dit.tensor_files import INDEX

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
SHAPES = [(8, 1, 4, 6), (8, 3, 6, 4), (8, 2, 2, 2), (8, 3, 6, 4)]


def random_peer(seed=0, **overrides):
    torch.manual_seed(seed)
    peer = diffusers.WanTransformer3DModel(**{**SMALL, **overrides}).eval()
    for parameter in peer.parameters():  # no zero, no one: every weight must matter
        torch.nn.init.normal_(parameter, std=0.2)
    return peer


@pytest.fixture(scope="module")
def peer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    random_peer().save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def dit(peer_folder):
    return VideoDiT.from_pretrained(str(peer_folder))


def random_samples(seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(shape, generator=generator) for shape in SHAPES]
    texts = [torch.randn(length, SMALL["text_dim"], generator=generator) for length in (5, 1, 7, 3)]
    return latents, [500.0, 3.0, 999.0, 250.0], texts


@torch.no_grad()
def test_equals_diffusers_on_each_sample_of_a_pack(dit):
    latents, timesteps, texts = random_samples()
    packed = pack(latents, timesteps, texts)
    predictions = packed.unpack(dit(packed))
    peer = random_peer()
    for sample, timestep, text, prediction in zip(latents, timesteps, texts, predictions, strict=True):
        expected = peer(sample[None], torch.tensor([timestep]), text[None]).sample[0]
        assert (prediction - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_a_timestep_for_each_frame_equals_diffusers(dit):
    latents, _, texts = random_samples()
    frame_timesteps = torch.tensor([0.0, 400.0, 900.0])
    packed = pack([latents[1]], [frame_timesteps], [texts[1]])
    (prediction,) = packed.unpack(dit(packed))
    per_token = frame_timesteps.repeat_interleave(6)[None]  # 3 x 2 tokens a frame
    expected = random_peer()(latents[1][None], per_token, texts[1][None]).sample[0]
    assert (prediction - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_samples_do_not_see_each_other(dit):
    latents, timesteps, texts = random_samples()
    packed = pack(latents, timesteps, texts)
    before = packed.unpack(dit(packed))
    changed = [latents[0], latents[1] * 3 + 1, *latents[2:]]
    packed = pack(changed, timesteps, texts)
    after = packed.unpack(dit(packed))
    assert not torch.equal(before[1], after[1])
    for place in (0, 2, 3):
        assert torch.equal(before[place], after[place])


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 30_000])
def test_saved_folder_is_read_by_diffusers(dit, tmp_path, max_shard_bytes):
    weights.save_model(dit, str(tmp_path), "transformer", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "transformer" / INDEX).exists() == (max_shard_bytes == 30_000)
    peer = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    expected = random_peer().state_dict()
    assert set(peer.state_dict()) == set(expected)
    for name, value in peer.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_first_prediction_is_zero():
    torch.manual_seed(0)
    latents, timesteps, texts = random_samples()
    prediction = VideoDiT(VideoDiTConfig(**SMALL))(pack(latents, timesteps, texts))
    assert torch.equal(prediction, torch.zeros_like(prediction))


@pytest.mark.parametrize("patch", [Stride(1, 2, 2), Stride(1, 1, 1), Stride(2, 2, 1)])
def test_patches_return_to_where_they_came_from(patch):
    latents = torch.arange(3 * 4 * 6 * 2.0).reshape(3, 4, 6, 2)
    tokens = patchify(latents, patch)
    assert torch.equal(unpatchify(tokens, LatentShape(4, 6, 2).grid(patch), patch), latents)


def test_pack_keeps_the_callers_order_and_refuses_misfits():
    latents, timesteps, texts = random_samples()
    packed = pack(latents, timesteps, texts)
    assert all(torch.equal(a, b) for a, b in zip(packed.unpack(packed.tokens), latents, strict=True))
    assert packed.num_tokens == sum(t * (h // 2) * (w // 2) for _, t, h, w in SHAPES)
    with pytest.raises(ValueError, match="rows=3 is not a multiple of the patch 2"):
        pack([torch.zeros(8, 1, 3, 4)], [0.0], [texts[0]])
    with pytest.raises(ValueError, match="2 latents, 1 timesteps"):
        pack(latents[:2], [0.0], texts[:2])
