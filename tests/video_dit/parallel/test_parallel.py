"""FSDP2 over gloo processes on the CPU: many processes compute what one does, and checkpoints move between them."""

import dataclasses
import functools

import pytest
import torch
from processes import launch

from video_dit.diffusion.losses import DiffusionConfig, diffusion_batch, diffusion_loss
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.checkpoint import Checkpoints
from video_dit.parallel.world import DistributedWorld
from video_dit.shapes import Stride
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import OptimizerConfig, SingleProcess, TrainState

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}
PATCH = Stride(1, 2, 2)
ADAMW = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, num_steps=12)
MIN_GROUP = {"adamw": 0, "muon": 1 << 20}  # each block sharded on its own, and all together
OPTIMIZERS = {"adamw": ADAMW, "muon": dataclasses.replace(ADAMW, matrix_learning_rate=0.02)}


def new_state(method, world):
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(**SIZES))
    if isinstance(world, DistributedWorld):
        parallelize(model, world.mesh, ParallelConfig(min_group=MIN_GROUP[method]))
    return TrainState(model, OPTIMIZERS[method], world)


def packs_of_step(step):
    """Three packs of mixed shapes: with two ranks one of them idles in the second round."""
    packs = []
    for number in range(3):
        generator = torch.Generator().manual_seed(100 * step + number)
        shapes = [(4, 1, 4, 4), (4, 2, 2, 6), (4, 3, 4, 2)][: number + 1]
        latents = [torch.randn(shape, generator=generator) for shape in shapes]
        texts = [torch.randn(3 + place, 8, generator=generator) for place in range(len(shapes))]
        keys = [(0, step, f"{number}-{place}") for place in range(len(shapes))]
        packs.append(diffusion_batch(latents, texts, torch.zeros(1, 8), keys, DiffusionConfig(), PATCH))
    return packs


def run_steps(state, until):
    losses, world = [], state.world
    while state.step < until:
        packs = packs_of_step(state.step)
        num_tokens = sum(batch.packed.num_tokens for batch in packs)
        rounds = -(-len(packs) // world.size)
        mine = []
        for place in range(world.rank, rounds * world.size, world.size):
            weight = 1.0 if place < len(packs) else 0.0
            mine.append(MicroBatch(inputs=packs[place % len(packs)], weight=weight, sample_ids=()))
        losses.append(train_step(state, mine, diffusion_loss, num_tokens)["loss"])
    return losses


def train_part(folder, method, resume):
    world = DistributedWorld("cpu")
    state = new_state(method, world)
    checkpoints = Checkpoints(str(folder), world)
    assert checkpoints.restore(state) == (6 if resume else None)
    losses = run_steps(state, 6 if not resume else 12)
    checkpoints.save(state)
    checkpoints.wait()
    return losses, world.gather_state(state.ema)


@functools.cache
def single(method):
    """Losses and averaged weights of one plain process, no sharding anywhere."""
    state = new_state(method, SingleProcess())
    return run_steps(state, 12), state.ema


@pytest.mark.parametrize("method", list(OPTIMIZERS))
@pytest.mark.parametrize(("first_size", "second_size"), [(2, 1), (1, 3)])
def test_processes_and_a_resume_on_another_number_of_them_change_nothing(tmp_path, method, first_size, second_size):
    losses, averaged = single(method)
    folder = tmp_path / "checkpoints"
    first_losses, _ = launch(first_size, tmp_path / "first", train_part, folder, method, False)[0]
    assert first_losses == pytest.approx(losses[:6], abs=1e-5)
    second_losses, second_averaged = launch(second_size, tmp_path / "second", train_part, folder, method, True)[0]
    assert second_losses == pytest.approx(losses[6:], abs=1e-5)
    for name, value in averaged.items():
        assert torch.allclose(second_averaged[name], value, atol=1e-4), name
