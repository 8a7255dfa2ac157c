"""scheduler_config.json: what we write, diffusers' schedulers read alike, and what they write, we do."""

import json

import diffusers
import pytest
import torch

from video_dit.diffusion.sampling import sample
from video_dit.diffusion.schedules import CosineSchedule, LinearBetaSchedule, RectifiedFlow, ScaledLinearSchedule
from video_dit.diffusion.targets import TARGETS
from video_dit.random import keyed_normal
from video_dit.scheduler_files import PREDICTION_TYPES, SamplingConfig, read_scheduler, write_scheduler

FLOWS = [RectifiedFlow(), RectifiedFlow(shift=3.0), RectifiedFlow(shift=2.0, base_tokens=256)]
CHAINS = [
    LinearBetaSchedule(),
    LinearBetaSchedule(beta_start=1e-3, beta_end=0.01, num_train_steps=500),
    ScaledLinearSchedule(zero_terminal_snr=True),
    CosineSchedule(),
    CosineSchedule(zero_terminal_snr=True),
]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", [*FLOWS, *CHAINS], ids=repr)
def test_what_is_written_is_read(tmp_path, schedule, target):
    sampling = SamplingConfig(schedule=schedule, target=target, fps=24.0)
    class_name = write_scheduler(str(tmp_path), sampling)
    assert read_scheduler(str(tmp_path)) == sampling
    peer = getattr(diffusers, class_name).from_pretrained(tmp_path, subfolder="scheduler")
    peer.save_pretrained(tmp_path / "scheduler")  # with all of diffusers' own defaults; it keeps our keys
    assert read_scheduler(str(tmp_path)) == sampling


@pytest.mark.parametrize("schedule", CHAINS, ids=repr)
def test_diffusers_reads_the_same_alphas(tmp_path, schedule):
    write_scheduler(str(tmp_path), SamplingConfig(schedule=schedule, target="v"))
    peer = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    torch.testing.assert_close(peer.alphas_cumprod.double(), schedule.alphas**2, rtol=0, atol=2e-5)


def test_diffusers_reads_the_same_shift(tmp_path):
    write_scheduler(str(tmp_path), SamplingConfig(schedule=RectifiedFlow(shift=3.0)))
    peer = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    peer.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(peer.sigmas.double(), RectifiedFlow(shift=3.0).sigmas(4))


@pytest.mark.parametrize(("schedule", "target"), [(LinearBetaSchedule(), "noise"), (CosineSchedule(), "v")], ids=repr)
def test_a_folder_is_sampled_from_as_diffusers_does(tmp_path, schedule, target):
    """Ten DDIM steps of the scheduler as diffusers loads it, with its own spacing of them."""
    write_scheduler(str(tmp_path), SamplingConfig(schedule=schedule, target=target))
    peer = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    peer.set_timesteps(10)
    x = theirs = keyed_normal((2, 3), "start")
    for time in peer.timesteps:
        theirs = peer.step(torch.tanh(theirs), time, theirs).prev_sample
    read = read_scheduler(str(tmp_path))
    ours = sample(
        lambda x, _: torch.tanh(x), x, schedule=read.schedule, target=read.target, sampler="ddim", num_steps=10
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_scheduler_of_wan(tmp_path):
    peer = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    peer.save_pretrained(tmp_path / "scheduler")
    assert read_scheduler(str(tmp_path)) == SamplingConfig(schedule=RectifiedFlow(shift=5.0))


def test_betas_that_a_file_leaves_out_are_those_of_diffusers(tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}))
    assert read_scheduler(str(tmp_path)).schedule == ScaledLinearSchedule(beta_start=1e-4, beta_end=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "_class_name='EDMEulerScheduler', beta_schedule=None: known are flows"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "linear", "trained_betas": [0.1]}, "without trained_betas"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "linear", "prediction_type": "score"}, "'score': known are"),
    ],
)
def test_unknown_files_are_named(tmp_path, values, message):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"scheduler_config.json: .*{message}"):
        read_scheduler(str(tmp_path))


def test_what_diffusers_has_no_name_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="offset=0.1, max_beta=0.999: diffusers' cosine schedule has 0.008"):
        write_scheduler(str(tmp_path), SamplingConfig(schedule=CosineSchedule(offset=0.1)))
    assert set(PREDICTION_TYPES) == set(TARGETS)
