"""Classifier guidance against closed forms: on a Gaussian mixture, Bayes' rule turns one sampler into another."""

import math

import pytest
import torch

from video_dit.diffusion.classifier_guidance import guided_estimate, with_classifier
from video_dit.diffusion.samplers import SAMPLERS
from video_dit.diffusion.sampling import sample
from video_dit.diffusion.schedules import CosineSchedule, LinearBetaSchedule, RectifiedFlow, ScaledLinearSchedule
from video_dit.diffusion.targets import TARGETS, Estimate, estimate, target_of
from video_dit.random import keyed_normal

SCHEDULES = {
    "flow": RectifiedFlow(),
    "shifted": RectifiedFlow(shift=3.0),
    "linear": LinearBetaSchedule(),
    "cosine": CosineSchedule(),
}
MEANS, STDS = torch.tensor([-1.5, 0.5, 2.0]).double(), torch.tensor([0.3, 0.6, 0.2]).double()
PRIOR = torch.tensor([0.5, 0.3, 0.2]).double()
NUM = 4_000


def component_log_prob(x, level):
    """log of prior * p(x | class), n classes: mixed with noise, each class stays a Gaussian."""
    alpha, sigma = level
    return torch.distributions.Normal(alpha * MEANS, ((alpha * STDS) ** 2 + sigma**2).sqrt()).log_prob(x[:, None]) + (
        PRIOR.log()
    )


def class_log_prob(schedule, wanted):
    """The exact classifier: log p(class | x), summed over x."""

    def log_prob(x, timestep):
        joint = component_log_prob(x, schedule.level(schedule.sigma_of(timestep)))
        return joint.log_softmax(1)[:, wanted].sum()

    return log_prob


def best_denoiser(schedule, target, wanted=None):
    """What an ideal model predicts: of all classes, or of one."""

    def denoise(x, timestep):
        level = schedule.level(schedule.sigma_of(timestep))
        alpha, sigma = level
        share = alpha * STDS**2 / ((alpha * STDS) ** 2 + sigma**2)
        data = MEANS + share * (x[:, None] - alpha * MEANS)  # n classes
        data = (component_log_prob(x, level).softmax(1) * data).sum(1) if wanted is None else data[:, wanted]
        return target_of(data, (x - alpha * data) / sigma, target, level)

    return denoise


def fresh_noise(num):
    return lambda step: keyed_normal((num,), "fresh", step).double()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_at_scale_1_the_exact_classifier_gives_the_conditional_samplers_points(sampler, target, schedule):
    """Point by point, from a level where there is some data on."""
    x, sigmas = keyed_normal((NUM,), "start")[:500].double(), schedule.sigmas(12)[1:]
    log_prob = class_log_prob(schedule, 2)
    guided = with_classifier(best_denoiser(schedule, target), log_prob, schedule, target, 1.0)
    common = {"schedule": schedule, "target": target, "sampler": sampler, "sigmas": sigmas}
    common["draw_noise"] = fresh_noise(500)
    ours = sample(guided, x, **common)
    torch.testing.assert_close(ours, sample(best_denoiser(schedule, target, 2), x, **common), rtol=0, atol=1e-9)
    unled = sample(with_classifier(best_denoiser(schedule, target), log_prob, schedule, target, 0.0), x, **common)
    assert torch.equal(unled, sample(best_denoiser(schedule, target), x, **common))
    assert (ours - unled).abs().max() > 1


@pytest.mark.parametrize(
    ("sampler", "schedule", "target", "num_steps", "wanted"),
    [
        ("ddpm", LinearBetaSchedule(), "noise", 300, 0),
        ("ddim", CosineSchedule(), "v", 200, 1),
        ("euler", RectifiedFlow(), "velocity", 300, 2),
        ("heun", RectifiedFlow(shift=3.0), "velocity", 60, 0),
        ("dpmpp_2m", LinearBetaSchedule(), "data", 60, 1),
        ("unipc", ScaledLinearSchedule(zero_terminal_snr=True), "v", 100, 2),
    ],
)
def test_pure_noise_becomes_the_class_that_was_asked_for(sampler, schedule, target, num_steps, wanted):
    """The class's mean and deviation, within four standard errors and a hundredth for the steps."""
    guided = with_classifier(best_denoiser(schedule, target), class_log_prob(schedule, wanted), schedule, target, 1.0)
    noise = keyed_normal((NUM,), "noise", wanted).double()
    common = {"schedule": schedule, "target": target, "sampler": sampler, "draw_noise": fresh_noise(NUM)}
    made = sample(guided, noise, num_steps=num_steps, **common)
    mean, std = MEANS[wanted].item(), STDS[wanted].item()
    assert made.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(NUM) + 0.01)
    assert made.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * NUM) + 0.01)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_both_estimates_still_mix_to_x(schedule):
    """And the noise is the paper's: eq. 14, noise - sigma * gradient."""
    sigma = torch.tensor([0.05, 0.4, 0.99]).double()
    level, x, gradient = schedule.level(sigma), *torch.randn(3, 3, dtype=torch.float64)[:2]
    before = estimate(x, torch.randn(3, dtype=torch.float64), "v", level)
    after = guided_estimate(before, gradient, level, 2.5)
    torch.testing.assert_close(level.mix(*after), x)
    torch.testing.assert_close(after.noise, before.noise - 2.5 * sigma * gradient)


def test_pure_noise_tells_of_no_class_and_data_is_left_alone():
    level = RectifiedFlow().level(torch.tensor([1.0, 0.0]))
    before = Estimate(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    after = guided_estimate(before, torch.tensor([7.0, 8.0]), level, 3.0)
    assert torch.equal(after.data, before.data)
    assert torch.equal(after.noise, before.noise)


def test_levels_may_differ_from_token_to_token():
    schedule, x = RectifiedFlow(), torch.randn(3, 2, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.3, 1.0]).double()[:, None]
    guided = with_classifier(lambda x, timestep: x, lambda x, timestep: (x**2).sum() / 2, schedule, "noise", 1.0)
    expected = torch.where(sigma == 1, x, x - sigma * x)
    torch.testing.assert_close(guided(x, schedule.timestep(sigma)), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_none_are_wanted(context):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def log_prob(x, timestep):
        return (weight * x * timestep).square().sum() / 2

    guided = with_classifier(lambda x, timestep: x, log_prob, RectifiedFlow(), "noise", 1.0)
    with context():
        x, timestep = torch.tensor([1.0, -1.0]), torch.tensor(500.0)
        found = guided(x, timestep)
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    torch.testing.assert_close(found, x - 0.5 * (weight.detach() * timestep) ** 2 * x)
    assert not found.requires_grad
    assert weight.grad is None


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="target='score': known are noise, data, v, velocity"):
        with_classifier(lambda x, timestep: x, lambda x, timestep: x.sum(), RectifiedFlow(), "score", 1.0)
