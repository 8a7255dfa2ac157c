"""What training sees: targets, noise levels, weights, and that all of it depends on a sample's key alone."""

import math
from itertools import pairwise

import pytest
import torch

from video_dit.diffusion.losses import (
    DiffusionConfig,
    diffusion_batch,
    diffusion_loss,
    draw_sigmas,
    logit_normal,
    loss_by_noise_level,
    loss_weight,
    token_errors,
)
from video_dit.diffusion.schedules import LinearBetaSchedule, RectifiedFlow
from video_dit.diffusion.targets import TARGETS, target_of
from video_dit.random import keyed_normal, keyed_uniform
from video_dit.shapes import Stride, TokenGrid

PATCH = Stride(1, 2, 2)
IMAGE = TokenGrid(1, 1, 1)


def test_logit_normal_has_the_moments_it_names():
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logits = torch.logit(logit_normal(uniform, mean=0.5, std=1.5))
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.5, abs=1e-2)


class Recorder(torch.nn.Module):
    """Predicts a constant and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, packed):
        self.packed = packed
        return torch.zeros_like(packed.tokens) + self.weight


def diffusion_inputs(config, names=("a", "b", "c")):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, t, 4, 2, generator=generator) for t in (1, 3, 2)][: len(names)]
    texts = [torch.full((2 + place, 5), float(place)) for place in range(len(names))]
    keys = [(7, 3, name) for name in names]
    return diffusion_batch(latents, texts, torch.full((1, 5), -1.0), keys, config, PATCH), latents


def batch_sigmas(batch):
    """The one noise level of each sample."""
    by_sample = batch.sigma.double().split([grid.num_tokens for grid in batch.packed.grids])
    return [by_sample[batch.packed.order.index(place)][0] for place in range(len(by_sample))]


def test_loss_is_the_mean_square_of_noise_minus_data():
    batch, latents = diffusion_inputs(DiffusionConfig(caption_dropout=0.0))
    model = Recorder()
    loss = diffusion_loss(model, batch)
    assert loss.item() == pytest.approx(batch.target.square().mean(dim=1).sum().item(), rel=1e-6)
    for sample_, velocity, noisy in zip(
        latents, batch.packed.unpack(batch.target), batch.packed.unpack(batch.packed.tokens), strict=True
    ):
        noise = velocity + sample_
        sigma = ((noisy - sample_) / (noise - sample_)).median()
        assert 0 < sigma < 1
        assert torch.allclose(noisy, (1 - sigma) * sample_ + sigma * noise, atol=1e-4)


def test_a_samples_noise_depends_on_its_key_alone():
    together, _ = diffusion_inputs(DiffusionConfig())
    alone, _ = diffusion_inputs(DiffusionConfig(), names=("a",))
    assert torch.equal(together.packed.unpack(together.target)[0], alone.packed.unpack(alone.target)[0])
    assert torch.equal(together.packed.unpack(together.packed.tokens)[0], alone.packed.unpack(alone.packed.tokens)[0])


def test_captions_are_dropped_as_often_as_asked():
    names = [str(number) for number in range(400)]
    latents = [torch.zeros(4, 1, 2, 2)] * 400
    texts = [torch.ones(3, 5)] * 400
    keys = [(0, 0, name) for name in names]
    batch = diffusion_batch(latents, texts, torch.zeros(1, 5), keys, DiffusionConfig(caption_dropout=0.25), PATCH)
    dropped = batch.packed.text_lengths.count(1)
    assert dropped == pytest.approx(100, abs=3 * math.sqrt(400 * 0.25 * 0.75))


def test_the_loss_is_the_target_that_was_asked_for():
    for target in TARGETS:
        schedule_name = "flow" if target == "velocity" else "linear"
        config = DiffusionConfig(schedule_name=schedule_name, target=target, caption_dropout=0.0)
        batch, latents = diffusion_inputs(config)
        noisy_samples, targets = (batch.packed.unpack(tokens) for tokens in (batch.packed.tokens, batch.target))
        for place, sigma in enumerate(batch_sigmas(batch)):
            noisy, wanted = noisy_samples[place], targets[place]
            level = config.schedule.level(sigma)
            noise = keyed_normal(latents[place].shape, 7, 3, "abc"[place], "noise")
            torch.testing.assert_close(noisy, level.mix(latents[place], noise))
            torch.testing.assert_close(wanted, target_of(latents[place], noise, target, level))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("target", TARGETS)
def test_min_snr_weighs_the_same_error_of_the_data_alike_for_every_target(target, gamma):
    schedule = LinearBetaSchedule()
    level = schedule.level(torch.tensor([0.1, 0.5, 0.9]))
    data, noise = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x, wrong = level.mix(data, noise), data + 0.01
    exact = target_of(data, noise, target, level)
    predicted = target_of(wrong, (x - level.alpha * wrong) / level.sigma, target, level)
    config = DiffusionConfig(schedule_name="linear", target=target, min_snr_gamma=gamma)
    weighted = loss_weight(level, config) * (predicted - exact) ** 2
    snr = (level.alpha / level.sigma) ** 2
    torch.testing.assert_close(weighted, snr.clamp_max(gamma) * 0.01**2)
    if target == "noise":  # the paper's form
        torch.testing.assert_close(loss_weight(level, config), snr.clamp_max(gamma) / snr)


def test_uniform_times_visit_every_step_of_the_chain_alike():
    config = DiffusionConfig(schedule_name="linear", times="uniform")
    drawn = torch.stack([draw_sigmas(config, IMAGE, (number,))[0] for number in range(2000)])
    steps = config.schedule.timestep(drawn)
    assert steps.mean().item() == pytest.approx(499.5, abs=3 * 1000 / math.sqrt(12 * 2000))


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_given_frames_are_clean_and_told_so_and_weigh_nothing(rate):
    config = DiffusionConfig(condition_rate=rate, caption_dropout=0.0)
    num, shape = 300, (4, 3, 2, 2)
    latents = [torch.full(shape, float(number + 1)) for number in range(num)]
    keys = [(0, 0, str(number)) for number in range(num)]
    batch = diffusion_batch(latents, [torch.zeros(1, 5)] * num, torch.zeros(1, 5), keys, config, PATCH)
    packed = batch.packed
    is_given = batch.sigma == 0
    assert torch.equal(packed.timesteps[packed.frame_of_token] == 0, is_given)
    assert torch.equal(batch.weight, (~is_given).float())
    clean = torch.tensor([place + 1.0 for place in packed.order]).repeat_interleave(3)
    assert torch.equal((packed.tokens == clean[:, None]).all(dim=1), is_given)
    conditioned = is_given.view(num, 3).any(dim=1)
    assert not is_given.view(num, 3).all(dim=1).any()
    assert conditioned.float().mean().item() == pytest.approx(rate, abs=3 * math.sqrt(rate * (1 - rate) / num) + 1e-9)
    trained = token_errors(Recorder(), batch)[~is_given].sum().item()
    assert diffusion_loss(Recorder(), batch).item() == pytest.approx(trained, rel=1e-6)


def test_min_snr_gives_given_data_no_weight():
    for target in TARGETS:
        config = DiffusionConfig(schedule_name="linear", target=target, min_snr_gamma=5.0)
        weight = loss_weight(config.schedule.level(torch.tensor([0.0, 0.5])), config)
        assert weight[0] == 0
        assert weight[1] > 0


def test_images_are_never_given_and_have_one_level():
    for key in range(50):
        sigma = draw_sigmas(DiffusionConfig(condition_rate=1.0, independent_rate=1.0), IMAGE, (key,))
        assert sigma.shape == (1,)
        assert sigma > 0


def test_levels_of_frames_are_independent_as_often_as_asked():
    config = DiffusionConfig(independent_rate=0.5, times="uniform")
    drawn = torch.stack([draw_sigmas(config, TokenGrid(4, 1, 1), (number,)) for number in range(1000)])
    independent = (drawn[:, 1:] != drawn[:, :1]).all(dim=1)
    assert torch.equal(independent, (drawn[:, 1:] != drawn[:, :1]).any(dim=1))
    assert independent.double().mean().item() == pytest.approx(0.5, abs=0.05)
    correlation = torch.corrcoef(drawn[independent].T) - torch.eye(4)
    assert correlation.abs().max() < 0.15
    assert drawn[independent].mean(dim=0).tolist() == pytest.approx([0.5] * 4, abs=0.05)


def test_without_rates_every_sample_has_the_level_it_always_had():
    config = DiffusionConfig(times="uniform")
    for number in range(20):
        assert draw_sigmas(config, TokenGrid(3, 1, 1), (number,)).tolist() == [keyed_uniform(number, "sigma")] * 3


def test_large_videos_are_trained_at_the_noise_levels_they_are_sampled_at():
    config = DiffusionConfig(times="uniform", shift=3.0, base_tokens=4)
    for size, shift in ((2, 3.0), (4, 6.0)):
        sigma = draw_sigmas(config, TokenGrid(1, size, size), (0,))
        assert sigma == RectifiedFlow(shift=shift).sigma_at(torch.tensor(keyed_uniform(0, "sigma")).double())


def test_errors_by_noise_level_add_up_without_given_frames():
    errors = torch.tensor([5.0, 1.0, 2.0, 4.0, 8.0])
    sigma = torch.tensor([0.0, 0.01, 0.5, 0.51, 1.0])
    assert loss_by_noise_level(errors, sigma, num_buckets=2) == {"sigma_0_0.5": (3.0, 2.0), "sigma_0.5_1": (12.0, 2.0)}
    fifths = loss_by_noise_level(errors, sigma)
    assert list(fifths) == [f"sigma_{a}_{b}" for a, b in pairwise(["0", "0.2", "0.4", "0.6", "0.8", "1"])]
    assert sum(float(total) for total, _ in fifths.values()) == 15.0
    assert fifths["sigma_0.2_0.4"] == (0.0, 0.0)
    with pytest.raises(ValueError, match="num_buckets=0"):
        loss_by_noise_level(errors, sigma, num_buckets=0)


def test_errors_name_the_field():
    with pytest.raises(ValueError, match=r"condition_rate=1.5: must be between 0 and 1"):
        DiffusionConfig(condition_rate=1.5)
    with pytest.raises(ValueError, match=r"independent_rate=-1: must be between 0 and 1"):
        DiffusionConfig(independent_rate=-1)
    with pytest.raises(ValueError, match="target='noise': schedule_name='flow' reaches pure noise"):
        DiffusionConfig(target="noise")
    with pytest.raises(ValueError, match="target='score': known are noise, data, v, velocity"):
        DiffusionConfig(target="score")
    with pytest.raises(ValueError, match="min_snr_gamma=0"):
        DiffusionConfig(min_snr_gamma=0)
