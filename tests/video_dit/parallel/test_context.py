"""Context parallelism on 2 and 4 processes computes what one process does, forward and backward."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch.distributed.device_mesh import init_device_mesh

from video_dit.attention import Segments, attend
from video_dit.diffusion.losses import FlowBatch, flow_loss
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import pack, shard_lengths
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.context import AllGatherAttention, UlyssesAttention, gather_tokens, use_context_parallel
from video_dit.parallel.world import DistributedWorld

# 43 tokens, packed in order of length: 1 3 6 6 27. The last clip lies on three of four processes.
MIXED = [(4, 3, 6, 6), (4, 1, 2, 2), (4, 2, 2, 6), (4, 1, 2, 6), (4, 2, 2, 6)]
TINY = [(4, 1, 2, 2), (4, 1, 2, 4)]  # 3 tokens: of four processes one has none


def model_of(heads):
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16}
    model = VideoDiT(VideoDiTConfig(num_attention_heads=heads, ffn_dim=32, num_layers=2, **sizes))
    for parameter in model.parameters():  # no zero, no one: every weight must matter
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    texts = [torch.randn(1 + place, 8, generator=generator) for place in range(len(shapes))]
    timesteps = [torch.rand(shape[1], generator=generator) * 1000 for shape in shapes]
    packed = pack(latents, timesteps, texts)
    return FlowBatch(packed, torch.randn(packed.tokens.shape, generator=generator))


def results(model, batch):
    """Prediction, loss and gradients."""
    model.zero_grad()
    loss = flow_loss(model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"prediction": model(batch.packed).detach(), "loss": loss.detach()} | gradients


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


CASES = [(heads, form, shapes) for heads, form in ((4, "ulysses"), (3, "auto")) for shapes in (MIXED, TINY)]
CASES += [(4, "all_gather", MIXED)]


def on_shards():
    """Of each case: the whole prediction, and loss and gradients added up over the processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for heads, form, shapes in CASES:
        model, batch = model_of(heads), batch_of(shapes)
        use_context_parallel(model, mesh, form)
        values = results(model, batch.shard(mesh.get_local_rank(), mesh.size()))
        prediction = gather_tokens(values.pop("prediction"), batch.packed.num_tokens, mesh.get_group())
        for value in values.values():
            dist.all_reduce(value)
        found.append({"prediction": prediction} | values)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_shards_compute_what_the_whole_pack_does(tmp_path, size):
    for found in launch(size, tmp_path, on_shards):
        for (heads, _, shapes), values in zip(CASES, found, strict=True):
            assert_close(values, results(model_of(heads), batch_of(shapes)))


FSDP_CASES = [
    ParallelConfig(context_size=2, min_group=0, context_form=form, activation_checkpointing=kept)
    for form, kept in (("ulysses", "selective"), ("all_gather", "block"))
]


def on_a_grid_of_processes():
    """Of each case: gradients of the sum of two packs' losses, each pack on two processes, weights on all four."""
    world = DistributedWorld("cpu", context_size=2)
    data, context = world.mesh.get_coordinate()
    found = []
    for config in FSDP_CASES:
        model = parallelize(model_of(heads=2), world.mesh, config)
        (flow_loss(model, batch_of(MIXED, seed=data).shard(context, 2)) * world.size).backward()
        found.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
    return found


def test_composes_with_sharded_weights_and_checkpointing(tmp_path):
    whole = model_of(heads=2)
    for seed in range(2):
        flow_loss(whole, batch_of(MIXED, seed)).backward()
    for found in launch(4, tmp_path, on_a_grid_of_processes):
        for gradients in found:
            assert_close(gradients, {name: parameter.grad for name, parameter in whole.named_parameters()})
