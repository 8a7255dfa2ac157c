"""Tiles of large frames: places and weights in closed form; exact for a network without seams, measured for the VAE."""

from itertools import pairwise

import pytest
import torch

from video_dit.shapes import Stride
from video_dit.vae import Tiling, VideoVAE, VideoVAEConfig, split_latents
from video_dit.vae_tiling import TiledNetwork, spans


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(60, 32, 8), (33, 32, 16), (40, 16, 8), (16, 32, 8), (104, 32, 8)]
)
def test_spans_cover_an_axis_and_their_weights_add_up_to_one(length, tile, overlap):
    scale, total = 3, torch.zeros(3 * length)
    places = spans(length, tile, overlap, scale)
    for span in places:
        assert span.stop - span.start == min(tile, length)
        total[span.crop(scale)] += span.weights
    assert (places[0].start, places[-1].stop) == (0, length)
    assert all(after.start <= before.stop - min(overlap, tile) for before, after in pairwise(places))
    torch.testing.assert_close(total, torch.ones(3 * length))


def test_a_network_without_seams_gives_the_whole_frame():
    network = TiledNetwork(
        lambda x, cache: x.repeat_interleave(8, 3).repeat_interleave(8, 4), Tiling(tile_px=64, overlap_px=24), 8, (1, 8)
    )
    for t in (1, 4):  # chunks
        x = torch.randn(2, 3, t, 20, 13)
        torch.testing.assert_close(network(x), x.repeat_interleave(8, 3).repeat_interleave(8, 4))


@torch.no_grad()
def test_seams_are_small_and_shrink_with_the_overlap():
    torch.manual_seed(0)
    vae = VideoVAE(VideoVAEConfig(base_dim=8)).eval()
    video = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 8, 12) * 2 - 1, size=(9, 128, 192), mode="trilinear")
    latents = vae.encode(video).mean
    whole = vae.decode(latents)

    def error(tile_px, overlap_px):
        tiles = vae.decode_stream(latents.split((1, 2), dim=2), Tiling(tile_px=tile_px, overlap_px=overlap_px))
        return float((torch.cat(list(tiles), dim=2) - whole).square().mean().sqrt() / whole.std())

    with_attention = error(64, 32)
    for network in (vae.encoder, vae.decoder):
        network.mid_block.attentions[0].proj.weight.zero_()  # what is left are convolutions, which see only so far
    whole = vae.decode(latents)
    assert error(64, 32) < error(64, 8) < 0.01 < with_attention
    assert error(256, 64) < 1e-5  # one tile


def test_tiling_is_checked():
    with pytest.raises(ValueError, match="overlap_px=200: must be positive and at most half of tile_px=256"):
        Tiling(overlap_px=200)


@pytest.mark.parametrize(
    ("frames", "num_pixels", "sizes"),
    [
        (21, 1 << 20, [21]),
        (21, 4 * 256 * 8, [9, 8, 4]),
        (21, 4 * 256 * 7, [5, 4, 4, 4, 4]),
        (5, 4 * 256 * 2, [2, 2, 1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_latents_are_split_by_pixels_and_for_the_convolutions(frames, num_pixels, sizes):
    latents = torch.zeros(1, 4, frames, 2, 2)
    assert [chunk.shape[2] for chunk in split_latents(latents, Stride(4, 8, 8), num_pixels)] == sizes


@torch.no_grad()
def test_channels_stay_innermost_in_every_layer(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "video_dit.vae_layers.F.silu", lambda x, inplace: seen.append(x.stride(1)) or torch.sigmoid(x) * x
    )
    for fields in ({"dim_mult": (1, 2, 4, 4)}, {"dim_mult": (1, 2, 4, 4), "is_residual": True}):
        vae = VideoVAE(VideoVAEConfig(base_dim=8, **fields)).eval()
        vae.decode(vae.encode(torch.rand(2, 3, 5, 32, 32)).mean)
    assert len(seen) > 80
    assert set(seen) == {1}
