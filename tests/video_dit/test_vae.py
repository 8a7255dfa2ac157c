"""The VAE against diffusers' AutoencoderKLWan, against itself in chunks, and against closed forms."""

import dataclasses
import gc
import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.distributions import Normal, kl_divergence

from video_dit.shapes import Stride
from video_dit.vae import Gaussian, VideoVAE, VideoVAEConfig


def make_config(**fields):
    """A small config; the strides follow from its stages."""
    z_dim, patch = fields.setdefault("z_dim", 4), fields.get("patch_size") or 1
    stages = fields.setdefault("temperal_downsample", (True, True))
    statistics = {"latents_mean": [0.3 * i - 0.5 for i in range(z_dim)], "latents_std": [0.5 + i for i in range(z_dim)]}
    return VideoVAEConfig(
        **{key: tuple(value) for key, value in statistics.items()},
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        scale_factor_temporal=2 ** sum(stages),
        scale_factor_spatial=patch * 2 ** len(stages),
        **fields,
    )


CONFIGS = {
    "plain": make_config(base_dim=8, dim_mult=(1, 2, 4)),
    "plain, wan stages": make_config(
        base_dim=4, dim_mult=(1, 2, 4, 4), temperal_downsample=(False, True, True), num_res_blocks=1, z_dim=3
    ),
    "residual": make_config(base_dim=8, dim_mult=(1, 4, 4), patch_size=2, is_residual=True, z_dim=6),
    "residual, late time": make_config(
        base_dim=8, decoder_base_dim=12, dim_mult=(1, 2, 2), temperal_downsample=(False, True), patch_size=2,
        is_residual=True, num_res_blocks=1, z_dim=5,
    ),
    "residual, no time": make_config(base_dim=8, dim_mult=(2, 2), temperal_downsample=(False,), is_residual=True),
}  # fmt: skip
SHAPES = [(1, 16, 32), (5, 32, 16), (9, 16, 16), (17, 16, 32)]


def make_vae(config):
    """Random weights everywhere, norms included, of a size that lets the signal through all layers."""
    torch.manual_seed(0)
    vae = VideoVAE(config).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.mul_(2)
    return vae


def make_peer(vae):
    """diffusers' model with the same weights, loaded strictly under the same names."""
    peer = AutoencoderKLWan(**json.loads(json.dumps(dataclasses.asdict(vae.config)))).eval()
    peer.load_state_dict(vae.state_dict(), strict=True)
    return peer


def make_video(num_frames, height_px, width_px, batch=1):
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(batch, 3, num_frames, height_px, width_px, generator=generator) * 2 - 1


def normaliser(config):
    return (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name):
    vae = make_vae(CONFIGS[name])
    peer, (mean, std) = make_peer(vae), normaliser(vae.config)
    for shape in SHAPES:
        video = make_video(*shape, batch=1 + shape[0] % 3 // 2)  # a batch of one takes a path of its own on CPU
        ours, theirs = vae.encode(video), peer.encode(video).latent_dist
        torch.testing.assert_close(ours.mean * std + mean, theirs.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.raw_logvar, theirs.logvar, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.std * std, theirs.std, rtol=1e-4, atol=1e-5)
        latents = torch.randn(ours.mean.shape, generator=torch.Generator().manual_seed(1))
        decoded = peer.decode(latents * std + mean).sample
        assert decoded.abs().lt(1).float().mean() > 0.5  # the clamp does not hide the comparison
        torch.testing.assert_close(vae.decode(latents), decoded, rtol=0, atol=1e-4)
        assert vae.decode(latents).shape == video.shape


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [(1, 4, 4, 4, 4), (5, 12), (1, 8, 8), (9, 4, 4)])
@torch.no_grad()
def test_stream_equals_whole(name, sizes):
    vae = make_vae(CONFIGS[name])
    stride_t = vae.config.stride.t
    video = make_video(17, 16, 32)
    whole = vae.encode(video).mean
    streamed = list(vae.encode_stream(video.split(sizes, dim=2)))
    assert [chunk.shape[2] for chunk in streamed] == [-(-size // stride_t) for size in sizes]
    torch.testing.assert_close(torch.cat(streamed, dim=2), whole, rtol=0, atol=1e-5)
    frames = list(vae.decode_stream(whole.split([chunk.shape[2] for chunk in streamed], dim=2)))
    assert [chunk.shape[2] for chunk in frames] == list(sizes)
    torch.testing.assert_close(torch.cat(frames, dim=2), vae.decode(whole), rtol=0, atol=1e-5)


@torch.no_grad()
def test_memory_of_a_stream_does_not_grow():
    vae, held_bytes = make_vae(CONFIGS["residual"]), []

    def chunks():
        for _ in range(8):
            gc.collect()
            storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
            held_bytes.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
            yield torch.zeros(1, 6, 1, 4, 4)

    gc.freeze()  # what is older is not looked at, which would take seconds
    for _ in vae.decode_stream(chunks()):
        pass
    gc.unfreeze()
    assert held_bytes[0] < held_bytes[3] == held_bytes[-1]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_no_output_depends_on_later_frames(name):
    vae = make_vae(CONFIGS[name])
    stride_t = vae.config.stride.t
    video = make_video(9, 16, 16)
    changed = video.clone()
    changed[:, :, 5:] += 1
    latents, latents_changed = vae.encode(video).mean, vae.encode(changed).mean
    num_same = 1 + 4 // stride_t
    torch.testing.assert_close(latents_changed[:, :, :num_same], latents[:, :, :num_same], rtol=0, atol=1e-6)
    assert (latents_changed[:, :, num_same:] - latents[:, :, num_same:]).abs().max() > 1e-3
    decoded, decoded_changed = vae.decode(latents, clamp=False), vae.decode(latents_changed, clamp=False)
    torch.testing.assert_close(decoded_changed[:, :, :5], decoded[:, :, :5], rtol=0, atol=1e-6)
    assert (decoded_changed[:, :, 5:] - decoded[:, :, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["plain", "residual"])
@torch.no_grad()
def test_compiles_as_one_graph(name):
    vae, video = make_vae(CONFIGS[name]), make_video(9, 16, 32)
    compiled = torch.compile(lambda video: vae.decode(vae.encode(video).mean), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), vae.decode(vae.encode(video).mean), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_is_the_first_frame_of_a_video():
    vae = make_vae(CONFIGS["residual"])
    video = make_video(5, 32, 16, batch=2)
    image = vae.encode(video[:, :, :1]).mean
    torch.testing.assert_close(image, vae.encode(video).mean[:, :, :1], rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(image), vae.decode(vae.encode(video).mean)[:, :, :1], rtol=0, atol=1e-5)


def test_gaussian_closed_forms():
    torch.manual_seed(0)
    config = CONFIGS["residual"]
    posterior = make_vae(config).encode(make_video(5, 16, 16, batch=2))
    mean, std = normaliser(config)
    raw = Normal(posterior.mean * std + mean, posterior.std * std)
    expected = kl_divergence(raw, Normal(0.0, 1.0)).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-4, atol=1e-5)
    shape = (2, 3, 1, 1, 1)
    wide = Gaussian(torch.full(shape, 3.0), torch.full(shape, 2.0), torch.zeros(shape), torch.zeros(shape))
    assert wide.kl().tolist() == [0.0, 0.0]
    draws = torch.stack([wide.sample(torch.Generator().manual_seed(seed)) for seed in range(2000)])
    assert abs(draws.mean().item() - 3) < 0.1
    assert abs(draws.std().item() - 2) < 0.1
    assert torch.equal(wide.sample(torch.Generator().manual_seed(7)), draws[7])


@torch.no_grad()
def test_latent_statistics_normalise_and_leave_the_video_as_it_is():
    vae, video = make_vae(CONFIGS["plain"]), make_video(9, 32, 32)
    before = vae.decode(vae.encode(video).mean)
    raw = vae.encode(video).raw_mean
    mean, std = raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4))
    assert vae.with_latent_statistics(mean.tolist(), std.tolist()) is vae
    latents = vae.encode(video).mean
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"latents_std=.*positive"):
        vae.with_latent_statistics([0.0] * 4, [1.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("name", ["plain", "residual, late time"])
@torch.no_grad()
def test_folders_are_read_by_us_and_by_diffusers(name, tmp_path):
    vae, video = make_vae(CONFIGS[name]), make_video(5, 32, 16)
    vae.save_pretrained(str(tmp_path))
    again, peer = VideoVAE.from_pretrained(str(tmp_path)), AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert again.config == vae.config
    latents = vae.encode(video).mean
    assert torch.equal(again.encode(video).mean, latents)
    assert torch.equal(again.decode(latents), vae.decode(latents))
    mean, std = normaliser(vae.config)
    torch.testing.assert_close(peer.encode(video).latent_dist.mean, latents * std + mean, rtol=0, atol=1e-4)
    peer.save_pretrained(tmp_path / "theirs" / "vae")
    theirs = VideoVAE.from_pretrained(str(tmp_path / "theirs"))
    assert theirs.config == vae.config
    assert torch.equal(theirs.encode(video).mean, latents)


def test_published_sizes():
    wan_22 = {"latents_mean": (0.0,) * 48, "latents_std": (1.0,) * 48, "in_channels": 12, "out_channels": 12}
    with torch.device("meta"):
        plain = VideoVAE(VideoVAEConfig())
        residual = VideoVAE(
            VideoVAEConfig(
                base_dim=160, decoder_base_dim=256, z_dim=48, patch_size=2, is_residual=True, scale_factor_spatial=16,
                **wan_22,
            )
        )  # fmt: skip
    assert len(plain.state_dict()) == 194
    assert sum(p.numel() for p in plain.parameters()) == 126_892_531
    assert round(sum(p.numel() for p in residual.parameters()) / 1e6, 1) == 704.7
    assert plain.config.stride == Stride(4, 8, 8)
    assert residual.config.stride == Stride(4, 16, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"z_dim": 8}, "latents_mean=.*z_dim=8"),
        ({"temperal_downsample": (True,)}, "temperal_downsample=.*3 values"),
        ({"attn_scales": (1.0,)}, "attn_scales="),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"base_dim": 0}, "base_dim=0"),
        ({"patch_size": 2}, "in_channels=3: is .* 12"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal=8: the stages give 4"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial=16: the stages give 8"),
        ({"dim_mult": (1, 2, 2, 4), "is_residual": True}, "dim_mult=.*the last divides"),
        ({"base_dim": 5, "dim_mult": (1, 1, 1, 1)}, "dim_mult=.*5 channels is even"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoVAEConfig(**fields)


def test_shapes_are_checked():
    vae = VideoVAE(CONFIGS["plain"])
    with pytest.raises(ValueError, match="num_frames=6 is not 1"):
        vae.encode(make_video(6, 16, 16))
    with pytest.raises(ValueError, match="width_px=18 is not a multiple of 4"):
        vae.encode(make_video(5, 20, 18))
    with pytest.raises(ValueError, match="num_frames=4 is not 1"):
        list(vae.encode_stream([make_video(1, 16, 16), make_video(3, 16, 16)]))


def make_rectangles(batch=4, num_frames=5, side_px=32):
    """Coloured rectangles that move over a gray ground, fixed."""
    generator = torch.Generator().manual_seed(0)
    video = torch.zeros(batch, 3, num_frames, side_px, side_px)
    for sample in range(batch):
        colour = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        x, y, size = torch.randint(4, 12, (3,), generator=generator).tolist()
        for t in range(num_frames):
            video[sample, :, t, y + t : y + t + size, x + 2 * t : x + 2 * t + size] = colour
    return video


def test_trains_from_scratch():
    torch.manual_seed(0)
    vae = VideoVAE(make_config(base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, patch_size=2, is_residual=True))
    video, generator = make_rectangles(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        reconstruction, posterior = vae(video, generator)
        loss = (reconstruction - video).abs().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in vae.parameters())
