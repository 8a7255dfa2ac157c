"""Context parallelism on 2 and 4 processes computes what one process does, forward and backward."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from problem import MIXED, TINY, assert_close, batch_of, loss_and_gradients, model_of
from processes import launch
from torch.distributed.device_mesh import init_device_mesh

from video_dit.attention import Segments, attend
from video_dit.diffusion.losses import diffusion_loss
from video_dit.layers import SelfAttention
from video_dit.packing import shard_lengths
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.context import AllGatherAttention, UlyssesAttention, gather_tokens, use_context_parallel
from video_dit.parallel.world import DistributedWorld

CASES = [(heads, form, shapes) for heads, form in ((4, "ulysses"), (3, "auto")) for shapes in (MIXED, TINY)]
CASES += [(4, "all_gather", MIXED)]


def on_shards():
    """Of each case: the whole prediction, and loss and gradients added up over the processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match=rf"3 heads do not divide over {mesh.size()} processes"):
        use_context_parallel(model_of(heads=3), mesh, "ulysses")
    found = []
    for heads, form, shapes in CASES:
        model, batch = model_of(heads), batch_of(shapes)
        use_context_parallel(model, mesh, form)
        shard = batch.shard(mesh.get_local_rank(), mesh.size())
        values = loss_and_gradients(model, shard)
        for value in values.values():
            dist.all_reduce(value)
        with torch.inference_mode():
            prediction = gather_tokens(model(shard.packed), batch.packed.num_tokens, mesh.get_group())
        found.append(values | {"prediction": prediction.clone()})
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_shards_compute_what_the_whole_pack_does(tmp_path, size):
    for found in launch(size, tmp_path, on_shards):
        for (heads, _, shapes), values in zip(CASES, found, strict=True):
            model, batch = model_of(heads), batch_of(shapes)
            assert_close(values, loss_and_gradients(model, batch) | {"prediction": model(batch.packed).detach()})


WITH_CHECKPOINTING = [
    ParallelConfig(context_size=2, context_form="ulysses", activation_checkpointing="selective", min_group=0),
    ParallelConfig(context_size=2, context_form="all_gather", activation_checkpointing="block"),
]


def on_a_grid_of_processes():
    """Of each case: gradients of the sum of two packs' losses, each pack on two processes, weights on all four."""
    world = DistributedWorld("cpu", context_size=2)
    _, data, context = world.mesh.get_coordinate()
    found = []
    for config in WITH_CHECKPOINTING:
        model = parallelize(model_of(heads=2), world.mesh, config)
        (diffusion_loss(model, batch_of(MIXED, seed=data).shard(context, 2)) * world.size).backward()
        found.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
    return found


def test_composes_with_sharded_weights_and_checkpointing(tmp_path):
    model = model_of(heads=2)
    for seed in range(2):
        diffusion_loss(model, batch_of(MIXED, seed)).backward()
    for found in launch(4, tmp_path, on_a_grid_of_processes):
        for gradients in found:
            assert_close(gradients, {name: parameter.grad for name, parameter in model.named_parameters()})


def on_copies_of_the_model():
    """Gradients of four packs: two whole ones, then two that are shared by two processes; weights on two copies."""
    world = DistributedWorld("cpu", context_size=2, num_replicas=2)
    model = parallelize(model_of(heads=2), world.mesh, ParallelConfig(context_size=2, min_group=0))
    replica, _, context = world.mesh.get_coordinate()
    (diffusion_loss(model, batch_of(MIXED, seed=world.rank)) * world.size).backward()
    (diffusion_loss(model, batch_of(MIXED, seed=4 + replica).shard(context, 2)) * world.size).backward()
    parameter = next(model.parameters())
    assert parameter.to_local().numel() <= -(-parameter.numel() // 2) + parameter.numel() // parameter.shape[0]
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def test_copies_of_a_sharded_model_run_whole_and_shared_packs_by_turns(tmp_path):
    """HSDP: sharded over two processes, twice; each process a pack of its own, then every two one together."""
    model = model_of(heads=2)
    for seed in range(6):
        diffusion_loss(model, batch_of(MIXED, seed)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradients in launch(4, tmp_path, on_copies_of_the_model):
        assert_close(gradients, expected)


def test_a_pack_of_one_token_cannot_be_shared():
    with pytest.raises(ValueError, match="one token"):
        batch_of([(4, 1, 2, 2)]).shard(0, 2)


def test_only_attend_is_replaced(world):
    mesh = world.mesh["context"]
    forms = {"auto": UlyssesAttention, "ulysses": UlyssesAttention, "all_gather": AllGatherAttention}
    for form, expected in forms.items():
        model, plain = model_of(heads=2), model_of(heads=2)
        use_context_parallel(model, mesh, form)
        for module, twin in zip(model.modules(), plain.modules(), strict=True):
            assert type(module) is type(twin)
            changed = {name for name, value in vars(twin).items() if callable(value) and vars(module)[name] != value}
            assert changed == ({"attend"} if isinstance(module, SelfAttention) else set())
        assert {block.self_attention.attend for block in model.blocks} == {expected(attend, mesh.get_group())}
        assert list(model.state_dict()) == list(plain.state_dict())


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), size=st.integers(1, 7))
def test_shards_share_out_queries_and_keep_the_keys(lengths, size):
    keys = [2 * length for length in lengths]
    segments, num_tokens = Segments.of(lengths, keys), sum(lengths)
    bounds = [0]
    for length in shard_lengths(num_tokens, size):
        bounds.append(bounds[-1] + length)
    assert bounds[-1] == num_tokens
    assert max(shard_lengths(num_tokens, size)) - min(shard_lengths(num_tokens, size)) <= 1
    sample_of_token = [sample for sample, length in enumerate(lengths) for _ in range(length)]
    for start, stop in itertools.pairwise(bounds):
        own = [sample_of_token[start:stop].count(sample) for sample in range(len(lengths))]
        assert segments.of_queries(start, stop) == Segments.of(own, keys)


def test_a_shard_is_a_run_of_the_pack():
    batch = batch_of(MIXED)
    shards = [batch.shard(rank, 4) for rank in range(4)]
    assert [shard.packed.num_tokens for shard in shards] == [11, 11, 11, 10]
    assert torch.equal(torch.cat([shard.packed.tokens for shard in shards]), batch.packed.tokens)
    assert torch.equal(torch.cat([shard.target for shard in shards]), batch.target)
    assert torch.equal(torch.cat([shard.packed.frame_of_token for shard in shards]), batch.packed.frame_of_token)
    assert [shard.packed.first_token for shard in shards] == [0, 11, 22, 33]
    assert [run.q_length for run in shards[0].packed.cross_segments.runs] == [1, 3, 6, 1, 0]
    assert {shard.packed.self_segments for shard in shards} == {batch.packed.self_segments}
