"""Samplers step by step against diffusers' schedulers, on point-mass data, and on a Gaussian with a known answer."""

import itertools
import math

import diffusers
import pytest
import torch

from video_dit.diffusion.samplers import SAMPLERS
from video_dit.diffusion.sampling import sample
from video_dit.diffusion.schedules import (
    CosineSchedule,
    LinearBetaSchedule,
    RectifiedFlow,
    ScaledLinearSchedule,
)
from video_dit.diffusion.targets import TARGETS, target_of
from video_dit.random import keyed_normal

PREDICTION_TYPES = {"noise": "epsilon", "data": "sample", "v": "v_prediction", "velocity": "flow_prediction"}
SCHEDULES = {
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(shift=3.0),
    "linear": LinearBetaSchedule(),
    "cosine": CosineSchedule(),
    "zero terminal SNR": ScaledLinearSchedule(zero_terminal_snr=True),
}
STEPS = (4, 10, 50)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def toy_denoiser(x, level, target):
    """What a model that believes in certain data, nonlinear in x and in the noise level, predicts."""
    data = torch.tanh(x * (1 + level.sigma)) + 0.3 * torch.sin(3 * x + 4 * level.sigma)
    return target_of(data, (x - level.alpha * data) / level.sigma, target, level)


def fresh(step):
    return keyed_normal((2, 3, 5), "fresh", step).double()


def start():
    return keyed_normal((2, 3, 5), "start").double()


def of_level(schedule, sigmas, predict):
    """A denoiser from (x, level) -> prediction, for noise levels that the timesteps tell apart."""

    def denoise(x, timestep):
        sigma = next(sigma for sigma in sigmas if schedule.timestep(sigma) == timestep)
        return predict(x, schedule.level(sigma))

    return denoise


def assert_equal(schedule, sigmas, target, sampler, peer, eta=None):
    """Our points, before every evaluation and at the end, are those of a scheduler of diffusers."""
    ours = []

    def predict(x, level):
        ours.append(x)
        return toy_denoiser(x, level, target)

    options = {} if sampler not in ("ddim", "ddpm") else {"draw_noise": fresh, "eta": eta or 0.0}
    denoise = of_level(schedule, sigmas, predict)
    end = sample(denoise, start(), schedule=schedule, target=target, sampler=sampler, sigmas=sigmas, **options)
    theirs = [start()]
    seen = sigmas[:-1] if len(peer.timesteps) < len(sigmas) else peer.sigmas[:-1].double()  # Heun evaluates twice
    for time, sigma in zip(peer.timesteps, seen, strict=True):
        prediction = toy_denoiser(theirs[-1], schedule.level(sigma), target)
        theirs.append(peer.step(prediction, time, theirs[-1], **({} if eta is None else {"eta": eta})).prev_sample)
    for a, b in zip([*ours, end], theirs, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=0, atol=1e-5)


def in_float64(peer, num_steps):
    """Set a scheduler to so many steps, its tables in double precision; the noise levels and our schedule for it."""
    schedule = {"linear": LinearBetaSchedule(), "squaredcos_cap_v2": CosineSchedule()}[peer.config.beta_schedule]
    torch.testing.assert_close(peer.betas.double(), schedule.raw_betas(), rtol=1e-5, atol=1e-6)
    peer.betas, peer.alphas, peer.alphas_cumprod = schedule.raw_betas(), 1 - schedule.raw_betas(), schedule.alphas**2
    peer.set_timesteps(num_steps)
    steps = peer.timesteps.long()
    if hasattr(peer, "sigmas"):
        peer.sigmas = torch.cat([schedule.step_sigmas[steps] / schedule.alphas[steps], torch.zeros(1)])
    return torch.cat([schedule.step_sigmas[steps], torch.zeros(1)]), schedule


@pytest.fixture
def same_noise(monkeypatch):
    """Diffusers' random samplers draw our fresh noise, in order."""
    for module in (diffusers.schedulers.scheduling_ddpm, diffusers.schedulers.scheduling_ddim):
        steps = itertools.count()
        monkeypatch.setattr(module, "randn_tensor", lambda *args, steps=steps, **options: fresh(next(steps)))


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("target", ["noise", "data", "v"])
def test_ddpm_is_that_of_diffusers(same_noise, target, num_steps):
    peer = diffusers.DDPMScheduler(prediction_type=PREDICTION_TYPES[target], clip_sample=False)
    sigmas, schedule = in_float64(peer, num_steps)
    assert_equal(schedule, sigmas, target, "ddpm", peer)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("target", ["noise", "data", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(same_noise, eta, target, num_steps):
    peer = diffusers.DDIMScheduler(
        prediction_type=PREDICTION_TYPES[target], beta_schedule="squaredcos_cap_v2", clip_sample=False
    )
    sigmas, schedule = in_float64(peer, num_steps)
    peer.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    assert_equal(schedule, sigmas, target, "ddim", peer, eta)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_one_step_samplers_on_flows_are_those_of_diffusers(name, num_steps):
    peer = {
        "euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    }[name](shift=3.0)
    peer.set_timesteps(num_steps)
    sigmas = peer.sigmas.double().unique().flip(0)  # Heun's has inner levels twice
    assert_equal(RectifiedFlow(), sigmas, "velocity", name, peer)


MULTISTEP = {"dpmpp_2m": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("target", ["noise", "data", "v"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_samplers_are_those_of_diffusers(name, target, num_steps):
    peer = MULTISTEP[name](
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTION_TYPES[target]
    )
    sigmas, schedule = in_float64(peer, num_steps)
    assert_equal(schedule, sigmas, target, name, peer)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_samplers_on_flows_are_those_of_diffusers(name, num_steps):
    peer = MULTISTEP[name](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    peer.set_timesteps(num_steps)
    assert_equal(RectifiedFlow(), peer.sigmas.double(), "velocity", name, peer)


@pytest.mark.parametrize("num_steps", STEPS)
def test_our_noise_levels_are_the_published_ones(num_steps):
    """Trailing spacing: the last step of the chain comes first (arXiv 2305.08891, section 3.3)."""
    peer = diffusers.DDIMScheduler(timestep_spacing="trailing")
    peer.set_timesteps(num_steps)
    schedule = LinearBetaSchedule()
    seen = schedule.timestep(schedule.sigmas(num_steps)[:-1])
    torch.testing.assert_close(seen, peer.timesteps.double(), rtol=0, atol=0.5 + 1e-6)  # theirs are whole numbers


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50])
def test_exact_predictions_land_on_the_data(sampler, target, schedule, num_steps):
    if target == "noise" and schedule.alpha(schedule.sigmas(1)[0]) == 0:
        pytest.skip("pure noise and its noise say nothing of the data")
    data = keyed_normal((2, 3, 5), "data").double()

    def predict(x, level):
        return target_of(data, (x - level.alpha * data) / level.sigma, target, level)

    denoise = of_level(schedule, schedule.sigmas(num_steps), predict)
    options = {"draw_noise": fresh} if sampler == "ddpm" else {}
    landed = sample(denoise, start(), schedule=schedule, target=target, sampler=sampler, num_steps=num_steps, **options)
    torch.testing.assert_close(landed, data, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), LinearBetaSchedule()], ids=["flow", "linear"])
def test_the_order_of_each_sampler_shows_in_its_error(schedule):
    """On Gaussian data, halving the steps divides the error by 2 (first order) or by 4 (second)."""
    mean, std, x, top = 0.7, 0.5, start(), schedule.level(0.9)
    spread = math.sqrt((top.alpha * std) ** 2 + top.sigma**2)
    exact = mean + std * (x - top.alpha * mean) / spread  # the flow keeps each point's quantile

    def predict(x, level):  # the best denoiser is linear
        share = level.alpha * std**2 / ((level.alpha * std) ** 2 + level.sigma**2)
        data = mean + share * (x - level.alpha * mean)
        return target_of(data, (x - level.alpha * data) / level.sigma, "v", level)

    def error(sampler, num_steps):
        sigmas = torch.linspace(0.9, 0, num_steps + 1, dtype=torch.float64)
        denoise = of_level(schedule, sigmas, predict)
        end = sample(denoise, x, schedule=schedule, target="v", sampler=sampler, sigmas=sigmas)
        return (end - exact).abs().max().item()

    ratios = {name: error(name, 48) / error(name, 96) for name in SAMPLERS if name != "ddpm"}
    assert 1.8 < ratios["euler"] < 2.2
    assert ratios["ddim"] == ratios["euler"]
    assert all(ratios[name] > 2.5 for name in ("heun", "dpmpp_2m", "unipc")), ratios
