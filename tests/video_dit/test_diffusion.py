"""The one time convention, by value: what mixes, what is predicted, and where samplers land."""

import math

import pytest
import torch

from video_dit.diffusion.losses import FlowConfig, flow_batch, flow_loss
from video_dit.diffusion.sampling import SAMPLERS, classifier_free, sample
from video_dit.diffusion.schedules import RectifiedFlow, logit_normal
from video_dit.shapes import Stride

PATCH = Stride(1, 2, 2)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 4, 16])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_exact_velocity_of_one_point_lands_on_it(sampler, num_steps, shift):
    point = torch.tensor([1.5, -0.25, 3.0], dtype=torch.float64)
    noise = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)

    def denoise(x, timestep):  # x = (1 - sigma) point + sigma noise, so noise - point = (x - point) / sigma
        return (x - point) / (timestep / 1000)

    landed = sample(denoise, noise, schedule=RectifiedFlow(shift=shift), sampler=sampler, num_steps=num_steps)
    assert torch.allclose(landed, point, atol=1e-12)


def test_heun_is_of_second_order():
    def denoise(x, timestep):  # dx/dsigma = x: x(0) = x(1) / e
        return x

    noise = torch.ones(1, dtype=torch.float64)
    errors = []
    for num_steps in (16, 32):
        landed = sample(denoise, noise, schedule=RectifiedFlow(), sampler="heun", num_steps=num_steps)
        errors.append(abs(landed.item() - math.exp(-1)))
    first_order_last_step = errors[0] / errors[1]  # the last step is Euler's, so the order shows only above 2
    assert first_order_last_step > 2.5


def test_schedule_runs_from_noise_to_data_and_shifts_as_published():
    sigmas = RectifiedFlow(shift=3.0).sigmas(4)
    assert sigmas.tolist() == pytest.approx([1.0, 9 / 10, 3 / 4, 1 / 2, 0.0])
    assert RectifiedFlow().sigmas(2).tolist() == [1.0, 0.5, 0.0]


def test_mix_and_velocity_agree():
    data, noise = torch.tensor([2.0]), torch.tensor([-1.0])
    schedule = RectifiedFlow()
    assert schedule.mix(data, noise, 0.25).item() == pytest.approx(1.25)
    slope = (schedule.mix(data, noise, 0.6) - schedule.mix(data, noise, 0.5)) / 0.1
    assert slope.item() == pytest.approx(schedule.velocity(data, noise).item(), rel=1e-5)


def test_logit_normal_has_the_moments_it_names():
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logits = torch.logit(logit_normal(uniform, mean=0.5, std=1.5))
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.5, abs=1e-2)


def test_guidance_one_is_conditional_and_zero_unconditional():
    conditional, unconditional = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.allclose(classifier_free(conditional, unconditional, torch.tensor(1.0)), conditional)
    assert torch.equal(classifier_free(conditional, unconditional, torch.tensor(0.0)), unconditional)
    twice = classifier_free(conditional, unconditional, torch.tensor(2.0))
    assert torch.allclose(twice - conditional, conditional - unconditional, atol=1e-6)


class Recorder(torch.nn.Module):
    """Predicts a constant and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, packed):
        self.packed = packed
        return torch.zeros_like(packed.tokens) + self.weight


def flow_inputs(config, names=("a", "b", "c")):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, t, 4, 2, generator=generator) for t in (1, 3, 2)][: len(names)]
    texts = [torch.full((2 + place, 5), float(place)) for place in range(len(names))]
    keys = [(7, 3, name) for name in names]
    return flow_batch(latents, texts, torch.full((1, 5), -1.0), keys, config, PATCH), latents


def test_loss_is_the_mean_square_of_noise_minus_data():
    batch, latents = flow_inputs(FlowConfig(caption_dropout=0.0))
    model = Recorder()
    loss = flow_loss(model, batch)
    assert loss.item() == pytest.approx(batch.target.square().mean(dim=1).sum().item(), rel=1e-6)
    for sample_, velocity, noisy in zip(
        latents, batch.packed.unpack(batch.target), batch.packed.unpack(batch.packed.tokens), strict=True
    ):
        noise = velocity + sample_
        sigma = ((noisy - sample_) / (noise - sample_)).median()
        assert 0 < sigma < 1
        assert torch.allclose(noisy, (1 - sigma) * sample_ + sigma * noise, atol=1e-4)


def test_a_samples_noise_depends_on_its_key_alone():
    together, _ = flow_inputs(FlowConfig())
    alone, _ = flow_inputs(FlowConfig(), names=("a",))
    assert torch.equal(together.packed.unpack(together.target)[0], alone.packed.unpack(alone.target)[0])
    assert torch.equal(together.packed.unpack(together.packed.tokens)[0], alone.packed.unpack(alone.packed.tokens)[0])


def test_captions_are_dropped_as_often_as_asked():
    names = [str(number) for number in range(400)]
    latents = [torch.zeros(4, 1, 2, 2)] * 400
    texts = [torch.ones(3, 5)] * 400
    keys = [(0, 0, name) for name in names]
    batch = flow_batch(latents, texts, torch.zeros(1, 5), keys, FlowConfig(caption_dropout=0.25), PATCH)
    dropped = batch.packed.text_lengths.count(1)
    assert dropped == pytest.approx(100, abs=3 * math.sqrt(400 * 0.25 * 0.75))


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="shift=0"):
        RectifiedFlow(shift=0)
    with pytest.raises(ValueError, match="num_steps=0"):
        sample(lambda x, t: x, torch.zeros(1), schedule=RectifiedFlow(), num_steps=0)
    with pytest.raises(ValueError, match="sampler='magic': known are euler, heun"):
        sample(lambda x, t: x, torch.zeros(1), schedule=RectifiedFlow(), sampler="magic")
