"""Minimal filtering against the convolution it equals: values, gradients, causality and what the VAE makes of it."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from video_dit import winograd
from video_dit.vae import VideoVAE, VideoVAEConfig
from video_dit.vae_convs import Cache, CausalConv3d


@pytest.mark.parametrize("tile", winograd.TILES, ids=lambda tile: f"F({tile.size}, 3)")
def test_one_tile_is_a_three_tap_filter(tile):
    x, w = torch.randn(tile.size + 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    products = [a * b for a, b in zip(tile.inputs(x), tile.taps(w), strict=True)]
    outputs = torch.stack(tile.outputs(products, [None] * tile.size))
    torch.testing.assert_close(outputs, x.unfold(0, 3, 1) @ w, rtol=0, atol=1e-13)


# outputs after the first: one tile of 4; 4, 2 and a rest; six tiles of 4; one tile of 2
CASES = [(32, 5, 24, 1), (48, 8, 18, 2), (32, 25, 16, 1), (64, 3, 40, 1)]


@pytest.mark.parametrize(("channels", "frames", "side", "batch"), CASES)
def test_values_and_gradients_are_those_of_the_convolution(channels, frames, side, batch):
    torch.manual_seed(0)
    conv = CausalConv3d(channels, channels // 2, (3, 3, 3))
    x = torch.randn(batch, channels, frames, side, side, requires_grad=True)
    assert winograd.is_worthwhile(x, frames - 1)
    y = conv(x)
    direct = F.conv3d(
        F.pad(x.double(), (0, 0, 0, 0, 2, 0)), conv.weight.double(), conv.bias.double(), padding=(0, 1, 1)
    )
    torch.testing.assert_close(y, direct.float(), rtol=0, atol=1e-5)
    seed = torch.randn(y.shape)
    ours = torch.autograd.grad(y, [x, *conv.parameters()], seed)
    expected = torch.autograd.grad(direct, [x, *conv.parameters()], seed.double())
    for gradient, reference in zip(ours, expected, strict=True):
        assert (gradient - reference).abs().max() <= 1e-5 * reference.abs().max()


@torch.no_grad()
def test_chunks_give_the_whole():
    torch.manual_seed(0)
    conv, x = CausalConv3d(64, 64, (3, 3, 3)), torch.randn(1, 64, 13, 32, 32)
    cache = Cache()
    chunks = [conv(chunk, cache) for chunk in x.split((1, 2, 4, 6), dim=2)]
    torch.testing.assert_close(torch.cat(chunks, dim=2), conv(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_errors_do_not_grow_beyond_those_of_the_direct_convolution(monkeypatch):
    torch.manual_seed(0)
    vae = VideoVAE(VideoVAEConfig(base_dim=32)).eval()
    for name, parameter in vae.named_parameters():
        if "conv2.weight" in name:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)  # new residual blocks are the identity
    video = torch.rand(1, 3, 17, 64, 64) * 2 - 1
    filtered = vae.encode(video).mean
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1 << 20)
    direct = vae.encode(video).mean
    exact = vae.double().encode(video.double()).mean
    assert not torch.equal(filtered, direct)
    assert (filtered - exact).abs().max() <= 2 * (direct - exact).abs().max() <= 1e-4


@torch.no_grad()
def test_a_wide_vae_equals_diffusers():
    torch.manual_seed(0)
    peer = AutoencoderKLWan(base_dim=32).eval()
    vae = VideoVAE(VideoVAEConfig(base_dim=32)).eval()
    vae.load_state_dict(peer.state_dict())
    video = torch.rand(1, 3, 9, 48, 64) * 2 - 1
    posterior = vae.encode(video)
    torch.testing.assert_close(posterior.raw_mean, peer.encode(video).latent_dist.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(posterior.mean), peer.decode(posterior.raw_mean).sample, rtol=0, atol=5e-5)
