"""Student, frozen teacher and heads over FSDP2: many processes compute what one does, and a resumed run goes on."""

import copy
import dataclasses

import pytest
import torch
from processes import launch

from video_dit.diffusion.distillation import (
    AdversarialDistillation,
    DistillationConfig,
    distillation_batch,
    distillation_losses,
)
from video_dit.diffusion.losses import DiffusionConfig
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.checkpoint import Checkpoints
from video_dit.parallel.world import DistributedWorld
from video_dit.shapes import Stride
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import OptimizerConfig, SingleProcess, TrainState

SIZES = {"attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16, "ffn_dim": 64}
CONFIG, DIFFUSION = DistillationConfig(r1_weight=1.0, head_dim=8), DiffusionConfig(shift=3.0)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, num_steps=6)
HEADS = dataclasses.replace(OPTIMIZER, learning_rate=1e-2)
SHAPES = [
    [(4, 1, 4, 4)],
    [(4, 2, 2, 6), (4, 1, 4, 4)],
    [(4, 3, 4, 2)],
]  # of two processes one idles in the second round


def new_state(world, min_group=1 << 20):
    torch.manual_seed(0)
    teacher = VideoDiT(VideoDiTConfig(num_attention_heads=2, num_layers=2, **SIZES))
    torch.nn.init.normal_(teacher.head.out.weight, std=0.2)
    model = AdversarialDistillation(copy.deepcopy(teacher), teacher, CONFIG, DIFFUSION)
    if isinstance(world, DistributedWorld):
        parallelize(model, world.mesh, ParallelConfig(min_group=min_group))
    return TrainState(model, OPTIMIZER, world, {"heads": HEADS})


def packs_of_step(step):
    generator = torch.Generator().manual_seed(step)
    packs = []
    for number, shapes in enumerate(SHAPES):
        latents = [torch.randn(shape, generator=generator) for shape in shapes]
        texts = [torch.randn(3 + place, 8, generator=generator) for place in range(len(shapes))]
        keys = [(0, step, f"{number}-{place}") for place in range(len(shapes))]
        packs.append(
            distillation_batch(latents, texts, torch.zeros(1, 8), keys, CONFIG, DIFFUSION.schedule, Stride(1, 2, 2))
        )
    return packs


def run_steps(state, until):
    rows, world = [], state.world
    while state.step < until:
        packs = packs_of_step(state.step)
        num_tokens = sum(batch.packed.num_tokens for batch in packs)
        places = range(world.rank, -(-len(packs) // world.size) * world.size, world.size)
        mine = [
            MicroBatch(inputs=packs[place % len(packs)], weight=float(place < len(packs)), sample_ids=())
            for place in places
        ]
        rows.append(train_step(state, mine, distillation_losses, num_tokens))
    return rows


def train_part(folder, min_group, resume):
    world = DistributedWorld("cpu")
    state = new_state(world, min_group)
    checkpoints = Checkpoints(str(folder), world)
    assert checkpoints.restore(state) == (3 if resume else None)
    rows = run_steps(state, 6 if resume else 3)
    checkpoints.save(state)
    checkpoints.wait()
    return rows, world.gather_state(state.ema), world.gather_state(state.model.teacher.state_dict())


@pytest.mark.parametrize(("first_size", "second_size", "min_group"), [(2, 1, 0), (1, 2, 1 << 20)])
def test_processes_and_a_resume_on_another_number_of_them_change_nothing(tmp_path, first_size, second_size, min_group):
    state = new_state(SingleProcess())
    teacher = copy.deepcopy(state.model.teacher.state_dict())
    expected = run_steps(state, 6)
    folder = tmp_path / "checkpoints"
    first, _, _ = launch(first_size, tmp_path / "first", train_part, folder, min_group, False)[0]
    second, averaged, their_teacher = launch(second_size, tmp_path / "second", train_part, folder, min_group, True)[0]
    for row, expected_row in zip(first + second, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)
    assert {"distillation", "adversarial", "discriminator", "r1", "grad_norm", "grad_norm_heads"} < set(expected[0])
    assert averaged.keys() == state.ema.keys()
    assert not any(name.startswith("teacher") for name in averaged)
    for name, value in state.ema.items():
        assert torch.allclose(averaged[name], value, atol=1e-4), name
    for name, value in teacher.items():  # to the last bit, everywhere
        assert torch.equal(value, their_teacher[name])
        assert torch.equal(value, state.model.teacher.state_dict()[name])
