"""The VAE over processes: one trains on images while the other trains on videos, by AdamW and by Muon."""

import functools

import pytest
import torch
from processes import launch

from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.world import DistributedWorld
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import OptimizerConfig, SingleProcess, TrainState
from video_dit.vae import VideoVAE, VideoVAEConfig
from video_dit.vae_losses import VaeLossConfig, reconstruction_losses

VAE = VideoVAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=1e-3, num_steps=4),
    "muon": OptimizerConfig(learning_rate=1e-3, matrix_learning_rate=0.02, num_steps=4),
}


def video(step, number):
    """An image first, then a video."""
    generator = torch.Generator().manual_seed(10 * step + number)
    return torch.rand(1, 3, 1 if number == 0 else 5, 16, 16, generator=generator) * 2 - 1


def loss(model, inputs):
    step, number = inputs
    x = video(step, number)
    generator = torch.Generator().manual_seed(number)
    _, losses = reconstruction_losses(model, x, generator, VaeLossConfig(), touch_all=number == 0)
    return {name: value * x.numel() for name, value in losses.items()}


def run(method, world):
    torch.manual_seed(0)
    model = VideoVAE(VAE)
    if isinstance(world, DistributedWorld):
        parallelize(model, world.mesh, ParallelConfig())
    state, found = TrainState(model, OPTIMIZERS[method], world), []
    for step in range(4):
        mine = [
            MicroBatch(inputs=(step, number), weight=1.0, sample_ids=()) for number in range(world.rank, 2, world.size)
        ]
        found.append(train_step(state, mine, loss, num_elements=6 * 3 * 16 * 16)["loss"])
    return found, world.gather_state(state.ema) if isinstance(world, DistributedWorld) else state.ema


def in_a_process(method):
    return run(method, DistributedWorld("cpu"))


@functools.cache
def single(method):
    return run(method, SingleProcess())


@pytest.mark.parametrize("method", list(OPTIMIZERS))
def test_images_on_one_process_and_videos_on_the_other_train_like_both_on_one(tmp_path, method):
    losses, averaged = single(method)
    found, weights = launch(2, tmp_path, in_a_process, method)[0]
    assert found == pytest.approx(losses, abs=1e-5)
    for name, value in averaged.items():
        assert torch.allclose(weights[name], value, atol=1e-4), name


def test_only_kernels_over_time_are_touched_and_with_zero():
    torch.manual_seed(0)
    model = VideoVAE(VAE)
    names = {}
    for touch_all in (False, True):
        model.zero_grad()
        model(video(0, 0), torch.Generator().manual_seed(0), touch_all)[0].sum().backward()
        names[touch_all] = {name for name, value in model.named_parameters() if value.grad is not None}
    assert names[True] == {name for name, _ in model.named_parameters()}
    assert all(".time_conv." in name for name in names[True] - names[False])
    assert all(not model.get_parameter(name).grad.any() for name in names[True] - names[False])
    assert names[True] > names[False]
