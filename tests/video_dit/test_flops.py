"""Operations as torch counts them while the model runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from video_dit.flops import PEAK_FLOPS, forward_flops, measured_peak, peak_flops
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import pack

CONFIG = VideoDiTConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=40
)


def test_blocks_do_what_is_counted():
    model = VideoDiT(CONFIG)
    latents = [torch.randn(4, t, 4, 6) for t in (1, 3, 3)]
    packed = pack(latents, [500.0] * 3, [torch.randn(s, 8) for s in (2, 5, 1)])
    time = model.embed_time(packed)
    x = model.patch_embedding(packed.tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.run_blocks(x, packed, time)
    dim, frames, texts = CONFIG.dim, len(packed.timesteps), packed.text.shape[0]
    shared = 2 * frames * 6 * dim**2 + 2 * texts * (8 * dim + dim**2)  # once for all blocks
    assert counter.get_total_flops() == forward_flops(CONFIG, packed.lengths, packed.text_lengths) + shared


def test_wans_operations_are_the_published_ones():
    """81x480x832 through the 1.3B model: 283 TFLOP forward."""
    assert forward_flops(VideoDiTConfig(), [32_760], [512]) == pytest.approx(283e12, rel=0.01)


def test_speeds_are_known_by_name_or_measured():
    assert peak_flops("NVIDIA H200 141GB") == PEAK_FLOPS["H200"] == 989e12
    assert peak_flops("something else") is None
    assert 1e8 < measured_peak(size=64) < 1e14
