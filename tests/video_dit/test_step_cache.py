"""Reuse of block outputs between sampling steps: exact where nothing is reused, and each sample judged alone."""

import pytest
import torch

from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import concatenate, pack
from video_dit.step_cache import StepCache

SHAPES = [(4, 2, 4, 4), (4, 1, 2, 2), (4, 3, 2, 6)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 48,
    }
    model = VideoDiT(VideoDiTConfig(num_attention_heads=2, num_layers=3, **sizes)).eval()
    torch.nn.init.normal_(model.head.out.weight, std=0.5)
    return model


def pack_of(shapes, move=0.0, timestep=500.0):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, *shape, generator=generator) for shape in SHAPES]
    latents = [drawn[SHAPES.index(shape)][0] + move * drawn[SHAPES.index(shape)][1] for shape in shapes]
    texts = [torch.full((1 + SHAPES.index(shape), 8), 0.1) for shape in shapes]
    return pack(latents, [timestep] * len(shapes), texts)


@torch.no_grad()
def test_selected_samples_are_packed_as_if_alone(model):
    packed = pack_of(SHAPES)
    alone = pack_of([SHAPES[0], SHAPES[2]])
    places = sorted(packed.order.index(number) for number in (0, 2))
    some = packed.select(places)
    assert some.order == alone.order
    assert some.self_segments == alone.self_segments
    assert torch.equal(some.tokens, alone.tokens)
    assert torch.equal(some.frame_of_token, alone.frame_of_token)
    for part, expected in zip(some.unpack(model(some)), alone.unpack(model(alone)), strict=True):
        assert torch.equal(part, expected)
    twice = concatenate(packed, packed)
    again = twice.select(range(len(SHAPES), 2 * len(SHAPES)))
    assert torch.equal(again.tokens, packed.tokens)
    assert again.order == packed.order


@torch.no_grad()
def test_threshold_zero_changes_nothing(model):
    cache = StepCache([0.0] * 3)
    for timestep in (900.0, 500.0):
        packed = pack_of(SHAPES, timestep=timestep)
        torch.testing.assert_close(model(packed, cache), model(packed), rtol=0, atol=1e-5)
    assert cache.num_run == cache.num_asked == 6


@torch.no_grad()
def test_an_unchanged_sample_costs_one_block(model):
    cache, packed = StepCache([0.05] * 3), pack_of(SHAPES)
    first = model(packed, cache)
    calls = []
    handles = [block.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    torch.testing.assert_close(model(packed, cache), first, rtol=0, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert len(calls) == 1
    assert (cache.num_run, cache.num_asked) == (3, 6)


@torch.no_grad()
def test_a_sample_does_not_depend_on_the_others(model):
    """One sample changes little and one much: what each gets is what it gets alone."""
    together = StepCache([0.3] * 3)
    alone = {shape: StepCache([0.3]) for shape in SHAPES}
    for move in (0.0, 0.05, 0.1, 1.0):
        packed = pack_of(SHAPES, move)
        for shape, part in zip(SHAPES, packed.unpack(model(packed, together)), strict=True):
            single = pack_of([shape], move)
            torch.testing.assert_close(part, single.unpack(model(single, alone[shape]))[0], rtol=0, atol=1e-5)
    assert together.num_run == sum(cache.num_run for cache in alone.values())
    assert 3 < together.num_run < 12


@torch.no_grad()
def test_reused_outputs_are_near_where_the_change_is_small(model):
    cache = StepCache([10.0] * 3)
    model(pack_of(SHAPES), cache)
    packed = pack_of(SHAPES, move=0.02)
    exact = model(packed)
    error = (model(packed, cache) - exact).norm() / exact.norm()
    assert cache.num_run == 3
    assert 0 < error < 0.1
