"""Activation checkpointing, compiled blocks and bfloat16: the same numbers, and what they claim to save."""

import functools
import random
from collections import Counter

import pytest
import torch
from problem import MIXED, assert_close, batch_of, loss_and_gradients, model_of
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from video_dit.layers import modulate
from video_dit.parallel.activation_checkpointing import checkpoint_block
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.context import use_context_parallel
from video_dit.parallel.world import DistributedWorld

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
EXCHANGE = "_c10d_functional::all_to_all_single"


class Calls(TorchDispatchMode):
    """How often each operator runs, outside of compiled code."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    @classmethod
    def ignore_compile_internals(cls):
        return True  # else nothing would be compiled below this mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def compile_with(monkeypatch):
    """Choose what compiles the graphs that torch.compile finds, and forget those of other tests."""

    def choose(backend):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    torch._dynamo.reset()
    counters.clear()
    yield choose
    torch._dynamo.reset()


@functools.cache
def expected(shapes):
    return loss_and_gradients(model_of(heads=2), batch_of(list(shapes)))


@functools.cache
def attentions_in_one_forward():
    with torch.no_grad(), Calls() as calls:
        model_of(heads=2)(batch_of(MIXED).packed)
    assert calls.count[ATTENTION] > 0
    return calls.count[ATTENTION]


@pytest.mark.parametrize(("form", "attentions", "mlps"), [("none", 1, 1), ("block", 2, 2), ("selective", 1, 2)])
def test_checkpointing_changes_no_bit_and_recomputes_what_it_says(world, form, attentions, mlps):
    model = parallelize(model_of(heads=2), world.mesh, ParallelConfig(activation_checkpointing=form))
    with Calls() as calls:
        found = loss_and_gradients(model, batch_of(MIXED))
    assert_close(found, expected(tuple(MIXED)), tolerance=0)
    assert calls.count[ATTENTION] == attentions * attentions_in_one_forward()
    assert calls.count["aten::gelu"] == mlps * len(model.blocks) + 1  # one of the texts, outside of the blocks


@pytest.mark.parametrize(("form", "times"), [("block", 3), ("selective", 2)])  # forward, backward, recomputation
def test_selective_checkpointing_sends_no_exchange_again(world, form, times):
    model = model_of(heads=2)
    use_context_parallel(model, world.mesh["context"], "ulysses")
    for block in model.blocks:
        checkpoint_block(block, form)
    with Calls() as calls:
        found = loss_and_gradients(model, batch_of(MIXED))
    assert calls.count[EXCHANGE] == times * 2 * len(model.blocks)  # there and back
    assert_close(found, expected(tuple(MIXED)), tolerance=1e-6)


def random_batch(rng):
    shapes = [(4, rng.randint(1, 4), 2 * rng.randint(1, 3), 2 * rng.randint(1, 3)) for _ in range(rng.randint(1, 5))]
    return batch_of(shapes, seed=rng.randint(0, 1 << 30))


def test_packs_of_any_structure_share_the_compiled_code(world, compile_with):
    compile_with("eager")
    model, plain = model_of(heads=2), model_of(heads=2)
    parallelize(model, world.mesh, ParallelConfig(compile=True))
    model(batch_of(MIXED).packed)
    graphs_of_a_block = counters["stats"]["unique_graphs"]  # attention, in the middle, cuts it into several
    rng, structures = random.Random(0), set()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in range(200):
            packed = random_batch(rng).packed
            structures.add((packed.self_segments, packed.cross_segments))
            prediction = model(packed)
            if number % 20 == 0:
                torch.testing.assert_close(prediction, plain(packed), rtol=0, atol=1e-6)
    assert len(structures) > 150
    # frames of equal and of unequal sizes, and a token, a frame or a token of text that is alone, have their own graphs
    assert 3 <= graphs_of_a_block <= counters["stats"]["unique_graphs"] <= 4 * graphs_of_a_block


def test_compiled_blocks_equal_eager_ones_and_keep_attention(world, compile_with):
    compile_with("aot_eager")
    model = model_of(heads=2)
    use_context_parallel(model, world.mesh["context"], "ulysses")
    parallelize(model, world.mesh, ParallelConfig(compile=True, activation_checkpointing="selective", min_group=0))
    with Calls() as calls:
        assert_close(loss_and_gradients(model, batch_of(MIXED)), expected(tuple(MIXED)))
    assert calls.count[ATTENTION] == attentions_in_one_forward()
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs >= 3
    fewer = MIXED[:4]  # with fewer still, cross-attention's gradients are mostly rounding
    assert_close(loss_and_gradients(model, batch_of(fewer)), expected(tuple(fewer)))
    assert counters["stats"]["unique_graphs"] == num_graphs


def test_bf16_rounds_weights_and_activations_but_not_the_path_of_the_timesteps(world):
    batch, seen = batch_of(MIXED), {}
    plain = model_of(heads=2)
    model = parallelize(model_of(heads=2), world.mesh, ParallelConfig(precision="bf16", min_group=0))

    def look(name, module, inputs):
        x, text, time, _, rotation, *_ = inputs
        seen[name] = time, rotation
        seen[f"rounded of {name}"] = [x.dtype, text.dtype, module.mlp[0].weight.dtype]

    # after the sharding's own hooks, which gather the weights
    model.blocks[1].register_forward_pre_hook(functools.partial(look, "sharded"))
    plain.blocks[1].register_forward_pre_hook(functools.partial(look, "plain"))
    found, reference = loss_and_gradients(model, batch), loss_and_gradients(plain, batch)
    assert_close(found, reference, tolerance=0.1)
    assert seen["rounded of sharded"] == [torch.bfloat16] * 3
    for value, twin in zip(seen["sharded"], seen["plain"], strict=True):
        assert torch.equal(value, twin)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@torch.no_grad()
def test_a_model_in_bf16_takes_any_pack_and_modulates_in_float32(monkeypatch):
    packed, tables = batch_of(MIXED).packed, []
    model = model_of(heads=2)
    prediction = model(packed)

    def look(x, shift, scale, eps):
        tables.extend([shift, scale])
        return modulate(x, shift, scale, eps)

    monkeypatch.setattr("video_dit.model.modulate", look)
    rounded = model.bfloat16()(packed)
    assert rounded.dtype == torch.bfloat16
    assert {table.dtype for table in tables} == {torch.float32}
    assert (rounded - prediction).abs().max() <= 0.03 * prediction.abs().max()
    norm, x = model.blocks[0].self_attention.norm_q, torch.randn(5, 16).bfloat16()
    in_float32 = x.float() / (x.float().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.equal(norm(x), (in_float32 * norm.weight.float()).bfloat16())  # rounded once, at the end


def test_configs_that_do_not_fit_are_refused(world):
    with pytest.raises(ValueError, match="context_size=0"):
        ParallelConfig(context_size=0)
    for field in ("context_form", "activation_checkpointing", "precision"):
        with pytest.raises(ValueError, match=f"{field}='half': must be one of"):
            ParallelConfig(**{field: "half"})
    with pytest.raises(ValueError, match="context_size=2: the mesh has 1"):
        parallelize(model_of(heads=2), world.mesh, ParallelConfig(context_size=2))
    with pytest.raises(ValueError, match="context_size=2: must divide the 1 processes"):
        DistributedWorld("cpu", context_size=2)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="compile=True: Linear has no blocks, must be False"):
        parallelize(other, world.mesh, ParallelConfig(compile=True))
    with pytest.raises(ValueError, match="precision='bf16': Linear does not tell its float32_modules"):
        parallelize(other, world.mesh, ParallelConfig(precision="bf16"))
