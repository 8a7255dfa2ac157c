"""VideoDiT against diffusers' WanTransformer3DModel, and its own promises about packing."""

import diffusers
import pytest
import torch

from video_dit import weights
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import concatenate, pack, patchify, unpatchify
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
# Channels of Wan's image-to-video models: noise, a mask, an image. 2.1 sees the images through CLIP too: 257 vectors of
# one image, or twice that, with positions, of the first and the last frame.
CHANNELS = {"in_channels": 20, "out_channels": 8}
IMAGES = {
    "2.1 I2V": ({**CHANNELS, "image_dim": 10, "added_kv_proj_dim": 72}, 257),
    "2.1 FLF2V": ({**CHANNELS, "image_dim": 10, "added_kv_proj_dim": 72, "pos_embed_seq_len": 514}, 514),
    "2.2 I2V": (CHANNELS, None),
}


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


def image_samples(num_image_tokens):
    """Conditioned latents, timesteps, texts zero-padded to 512 tokens as diffusers wants them, and images."""
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(20, *shape[1:], generator=generator) for shape in SHAPES]
    texts = [torch.cat([text, torch.zeros(512 - len(text), SMALL["text_dim"])]) for text in random_samples()[2]]
    images = [torch.randn(num_image_tokens, 10, generator=generator) for _ in SHAPES] if num_image_tokens else None
    return latents, [500.0, 3.0, 999.0, 250.0], texts, images


def image_dit(folder, name):
    peer = random_peer(**IMAGES[name][0])
    peer.save_pretrained(folder / "transformer")
    return VideoDiT.from_pretrained(str(folder)), peer


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGES)
def test_image_conditioning_equals_diffusers_on_each_sample_of_a_pack(tmp_path, name):
    dit, peer = image_dit(tmp_path, name)
    latents, timesteps, texts, images = image_samples(IMAGES[name][1])
    packed = pack(latents, timesteps, texts, images=images)
    predictions = packed.unpack(dit(packed))
    for i, prediction in enumerate(predictions):
        seen = None if images is None else torch.cat(images[i : i + 1]).view(-1, 257, 10)  # first and last frame apart
        expected = peer(latents[i][None], torch.tensor([timesteps[i]]), texts[i][None], seen).sample[0]
        assert prediction.shape == expected.shape == (8, *latents[i].shape[1:])
        assert (prediction - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_samples_do_not_see_each_others_images_and_their_numbers_may_differ(tmp_path):
    dit, _ = image_dit(tmp_path, "2.1 I2V")
    latents, timesteps, texts, images = image_samples(257)
    images[3] = images[3][:100]
    packed = pack(latents, timesteps, texts, images=images)
    assert packed.image_lengths == (257, 257, 100, 257)  # sample 3 has as many tokens as sample 1, and fewer images
    before = packed.unpack(dit(packed))
    images[1] = images[1].flip(1)
    packed = pack(latents, timesteps, texts, images=images)
    after = packed.unpack(dit(packed))
    assert not torch.allclose(before[1], after[1], rtol=1e-3)
    assert all(torch.equal(before[place], after[place]) for place in (0, 2, 3))
    alone = pack(latents[3:], timesteps[3:], texts[3:], images=images[3:])
    torch.testing.assert_close(alone.unpack(dit(alone))[0], after[3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_form_of_a_pack_keeps_its_images(tmp_path):
    dit, _ = image_dit(tmp_path, "2.1 I2V")
    latents, timesteps, texts, images = image_samples(257)
    expected = dit(pack(latents, timesteps, texts, images=images))
    zeros = pack([latent * 0 for latent in latents], [0.0] * 4, [text[:1] for text in texts], images=images)
    filled = pack(latents, timesteps, texts)
    packed = zeros.with_texts(texts).replace(tokens=filled.tokens, timesteps=filled.timesteps).to("cpu")
    torch.testing.assert_close(packed.unpack(dit(packed)), filled.unpack(expected), rtol=1e-4, atol=1e-4)
    both = concatenate(packed, packed)
    torch.testing.assert_close(dit(both)[: packed.num_tokens], dit(both)[packed.num_tokens :])
    torch.testing.assert_close(dit(both)[: packed.num_tokens], dit(packed))
    with pytest.raises(ValueError, match="one pack has images"):
        concatenate(packed, filled)
    assert zeros.to("meta").images.is_meta


def test_images_that_a_model_misses_or_cannot_take_are_named(dit, tmp_path):
    with_images, _ = image_dit(tmp_path, "2.1 FLF2V")
    latents, timesteps, texts, images = image_samples(257)
    with pytest.raises(ValueError, match=r"image_dim=10: pack\(images=...\) .* it has none"):
        with_images(pack(latents, timesteps, texts))
    with pytest.raises(ValueError, match="image_dim=10: .* it has vectors of 3"):
        with_images(pack(latents, timesteps, texts, images=[image[:, :3] for image in images]))
    with pytest.raises(ValueError, match=r"pos_embed_seq_len=514: samples have \(257, 257, 257, 257\) image tokens"):
        with_images(pack(latents, timesteps, texts, images=images))
    with pytest.raises(ValueError, match="no image_dim"):
        dit(pack([latent[:8] for latent in latents], timesteps, texts, images=images))
    with pytest.raises(ValueError, match="4 latents and 1 images"):
        pack(latents, timesteps, texts, images=images[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_dim": 10}, "added_kv_proj_dim=None: must be 72 with image_dim=10"),
        ({"added_kv_proj_dim": 72}, "added_kv_proj_dim=72: must be None with image_dim=None"),
        ({"image_dim": 10, "added_kv_proj_dim": 10}, "added_kv_proj_dim=10: must be 72"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len=514: must be None without an image_dim"),
        ({"image_dim": 0}, "image_dim=0: must be at least 1"),
    ],
)
def test_image_fields_that_do_not_fit_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoDiTConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 30_000])
def test_saved_folder_is_read_by_diffusers(dit, tmp_path, max_shard_bytes):
    weights.save_model(dit, str(tmp_path), "transformer", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "transformer" / INDEX).exists() == (max_shard_bytes == 30_000)
    peer = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    expected = random_peer().state_dict()
    assert set(peer.state_dict()) == set(expected)
    for name, value in peer.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_fused_keys_and_values_of_images_are_two_maps_for_muon():
    dit = VideoDiT(VideoDiTConfig(**{**SMALL, **IMAGES["2.1 I2V"][0]}))
    num_fused = {id(matrix.parameter): matrix.num_fused for matrix in dit.hidden_matrices()}
    assert num_fused[id(dit.blocks[1].cross_attention.image_kv.weight)] == 2
    assert id(dit.image_embedding.mlp[1].weight) not in num_fused


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
