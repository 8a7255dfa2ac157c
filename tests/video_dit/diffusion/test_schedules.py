"""Schedules: published tables, closed forms against the chain of single steps, and errors."""

import diffusers
import pytest
import torch

from video_dit.diffusion.sampling import sample
from video_dit.diffusion.schedules import CosineSchedule, LinearBetaSchedule, RectifiedFlow, ScaledLinearSchedule

BETA_SCHEDULES = {
    "linear": LinearBetaSchedule(),
    "scaled_linear": ScaledLinearSchedule(),
    "squaredcos_cap_v2": CosineSchedule(),
}


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_the_steps_are_those_of_diffusers(name, zero_terminal_snr):
    ours = type(BETA_SCHEDULES[name])(zero_terminal_snr=zero_terminal_snr)
    options = {"beta_start": ours.beta_start, "beta_end": ours.beta_end} if name != "squaredcos_cap_v2" else {}
    peer = diffusers.DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_terminal_snr, **options)
    torch.testing.assert_close(ours.alphas**2, peer.alphas_cumprod.double(), rtol=0, atol=2e-6)
    assert (ours.alphas[-1] == 0) == zero_terminal_snr


def test_ddpm_as_published():
    schedule = LinearBetaSchedule()
    assert schedule.raw_betas()[0].item() == pytest.approx(1e-4)
    assert schedule.raw_betas()[-1].item() == pytest.approx(0.02)
    assert (schedule.alphas[-1] ** 2).item() == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("schedule", [LinearBetaSchedule(), CosineSchedule(), RectifiedFlow(shift=3.0)])
def test_a_chain_of_single_steps_has_the_closed_forms_distribution(schedule):
    """Mean and variance of the chain, exactly: both are linear in the data and in independent noises."""
    times = torch.linspace(0, 0.9, 181, dtype=torch.float64)
    sigmas = schedule.sigma_at(times)
    mean, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    one, nil = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        mean = schedule.mix_further(mean, nil, sigma, sigma_next)
        kept, added = (schedule.mix_further(x, noise, sigma, sigma_next) for x, noise in ((one, nil), (nil, one)))
        variance = kept**2 * variance + added**2
    end = schedule.level(sigmas[-1])
    torch.testing.assert_close(mean, end.alpha)
    torch.testing.assert_close(variance, end.sigma**2)


def test_a_single_step_is_ddpms():
    """x_t = sqrt(1 - beta) x_(t-1) + sqrt(beta) noise (arXiv 2006.11239, eq. 2)."""
    schedule = LinearBetaSchedule()
    x, noise = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    sigmas, beta = schedule.step_sigmas, schedule.raw_betas()[400]
    moved = schedule.mix_further(x, noise, sigmas[399].item(), sigmas[400].item())
    torch.testing.assert_close(moved, (1 - beta).sqrt() * x + beta.sqrt() * noise)


@pytest.mark.parametrize(
    "schedule", [LinearBetaSchedule(), CosineSchedule(), ScaledLinearSchedule(zero_terminal_snr=True)]
)
def test_timesteps_are_the_steps(schedule):
    seen = schedule.timestep(schedule.step_sigmas[:990])
    torch.testing.assert_close(seen, torch.arange(990, dtype=torch.float64), rtol=0, atol=1e-4)
    assert schedule.timestep(torch.zeros(1, dtype=torch.float64)) == 0


def test_flow_runs_from_noise_to_data_and_shifts_as_published():
    sigmas = RectifiedFlow(shift=3.0).sigmas(4)
    assert sigmas.tolist() == pytest.approx([1.0, 9 / 10, 3 / 4, 1 / 2, 0.0])
    assert RectifiedFlow().sigmas(2).tolist() == [1.0, 0.5, 0.0]
    assert RectifiedFlow().mix(torch.tensor([2.0]), torch.tensor([-1.0]), 0.25).item() == pytest.approx(1.25)


def test_larger_videos_get_a_larger_shift():
    schedule = RectifiedFlow(shift=3.0, base_tokens=100)
    assert schedule.of_size(400) == RectifiedFlow(shift=6.0)
    assert schedule.of_size(100).shift == 3.0
    assert RectifiedFlow(shift=3.0).of_size(400) == RectifiedFlow(shift=3.0)


def test_errors_name_the_field():
    noise = torch.zeros(1)
    flow = {"schedule": RectifiedFlow()}
    with pytest.raises(ValueError, match="shift=0"):
        RectifiedFlow(shift=0)
    with pytest.raises(ValueError, match="base_tokens=0"):
        RectifiedFlow(base_tokens=0)
    with pytest.raises(ValueError, match="num_steps=0"):
        sample(lambda x, t: x, noise, num_steps=0, **flow)
    with pytest.raises(ValueError, match="sampler='magic': known are ddpm, ddim, euler"):
        sample(lambda x, t: x, noise, sampler="magic", **flow)
    with pytest.raises(ValueError, match="draw_noise=None: sampler 'ddpm'"):
        sample(lambda x, t: x, noise, sampler="ddpm", **flow)
    with pytest.raises(ValueError, match="eta=0.5: only sampler 'ddim'"):
        sample(lambda x, t: x, noise, eta=0.5, **flow)
    with pytest.raises(ValueError, match="sigmas=.*must decrease"):
        sample(lambda x, t: x, noise, sigmas=torch.tensor([1.0, 0.5]), **flow)
    with pytest.raises(ValueError, match="target='noise': x is pure noise here"):
        sample(lambda x, t: x, noise, target="noise", num_steps=2, **flow)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("num_train_steps", [7, 400, 1000])
def test_a_timestep_tells_its_noise_level(name, num_train_steps, zero_terminal_snr):
    schedule = type(BETA_SCHEDULES[name])(num_train_steps=num_train_steps, zero_terminal_snr=zero_terminal_snr)
    sigmas = schedule.sigma_at(torch.linspace(1 / num_train_steps, 1, 90, dtype=torch.float64))
    torch.testing.assert_close(schedule.sigma_of(schedule.timestep(sigmas)), sigmas, rtol=0, atol=1e-12)
    last = schedule.sigma_of(schedule.timestep(schedule.sigmas(1)[0]))
    assert (schedule.alpha(last) == 0) == zero_terminal_snr  # guidance must know pure noise when it sees it
    first = schedule.sigma_of(torch.zeros(()))
    torch.testing.assert_close(first, schedule.step_sigmas[0])


def test_a_timestep_of_a_flow_is_a_thousand_noise_levels():
    schedule = RectifiedFlow(shift=3.0)
    sigmas = schedule.sigmas(7)
    torch.testing.assert_close(schedule.sigma_of(schedule.timestep(sigmas)), sigmas, rtol=0, atol=1e-15)


VISITED = [RectifiedFlow(), RectifiedFlow(shift=3.0), LinearBetaSchedule(), CosineSchedule()]


@pytest.mark.parametrize("schedule", VISITED, ids=repr)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9])
def test_levels_begin_where_asked_and_are_even_in_time(schedule, sigma):
    levels = schedule.sigmas(4, start=sigma)
    assert levels[0].item() == pytest.approx(sigma, abs=1e-12)
    assert levels[-1] == 0
    times = [schedule.time_of(level.item()) for level in levels]
    assert times == pytest.approx([times[0] * share for share in (1, 0.75, 0.5, 0.25, 0)], abs=1e-9)


@pytest.mark.parametrize("schedule", VISITED, ids=repr)
def test_from_pure_noise_they_are_the_schedules_own(schedule):
    evenly = torch.linspace(1, 0, 6, dtype=torch.float64)
    assert torch.equal(schedule.sigmas(5), schedule.sigma_at(evenly))
    assert schedule.sigmas(5)[0] == schedule.sigma_at(torch.ones((), dtype=torch.float64))


def test_the_size_matters_to_flows_that_say_so():
    flow = RectifiedFlow(shift=3.0, base_tokens=100)
    assert flow.of_size(400) == RectifiedFlow(shift=6.0)
    assert LinearBetaSchedule().of_size(400) == LinearBetaSchedule()
