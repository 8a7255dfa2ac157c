"""Given frames in training and sampling: how often, at which noise levels, and where held tokens go."""

from collections import Counter

import pytest
import torch

from video_dit.diffusion.held import LONE_SIGMA, draw_held, hold
from video_dit.diffusion.samplers import SAMPLERS
from video_dit.diffusion.sampling import sample
from video_dit.diffusion.schedules import LinearBetaSchedule, RectifiedFlow

MARKS = {0.0: "x", LONE_SIGMA: "~", torch.inf: "."}


def patterns(num_frames, num_draws=3000):
    """How often each pattern is drawn, as a share: "x" is given, "~" in part, "." is to make."""
    drawn = [draw_held(num_frames, (num_frames, number)).tolist() for number in range(num_draws)]
    names = Counter("".join(MARKS[level] for level in levels) for levels in drawn)
    return {name: count / num_draws for name, count in names.items()}


def test_given_frames_are_first_and_last_ones_as_often_as_said():
    assert patterns(2) == pytest.approx({"x.": 2 / 3, ".x": 1 / 3}, abs=0.04)
    of_three = {"x..": 3 / 14, "xx.": 1 / 14, "..x": 1 / 14, ".xx": 1 / 14, "x.~": 2 / 7, "x.x": 2 / 7}
    assert patterns(3) == pytest.approx(of_three, abs=0.04)
    of_five = patterns(5)
    assert of_five["x...~"] == pytest.approx(2 / 7, abs=0.04)
    exact = {f"{'x' * a}{'.' * (5 - a - b)}{'x' * b}" for a in range(5) for b in range(5) if 0 < a + b < 5}
    assert set(of_five) == {*exact, "x...~"}


def test_the_model_sees_held_tokens_at_their_levels_and_is_told_so():
    held_to = torch.tensor([[0.0], [torch.inf], [0.5]])
    clean, noise = torch.zeros(3, 2), torch.ones(3, 2)
    seen = []

    def denoise(tokens, timestep):
        seen.append((tokens[:, 0].tolist(), timestep[:, 0].tolist()))
        return torch.full_like(tokens, 7.0)

    held = hold(denoise, held_to, clean, RectifiedFlow(), "velocity")
    levels = torch.tensor([[0.1], [0.2], [0.4]])
    found = [held(0.75 * noise, torch.tensor(750.0)), held(levels * noise, 1000 * levels)]
    assert seen[0] == (pytest.approx([0, 0.75, 0.5]), pytest.approx([0, 750, 500]))
    assert seen[1] == (pytest.approx([0, 0.2, 0.4]), pytest.approx([0, 200, 400]))
    for prediction, expected in zip(found, [[1, 7, 1], [1, 7, 7]], strict=True):  # noise - clean, where it is held
        assert prediction[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [RectifiedFlow(shift=3.0), LinearBetaSchedule()], ids=["flow", "linear"])
def test_samplers_take_held_tokens_to_what_they_are(sampler, schedule):
    """Held to the end they land on it; let go half way they are on the path from their noise."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, fresh = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)
    half = float(schedule.sigmas(10)[5])
    held_to = torch.tensor([[0.0], [torch.inf], [half]], dtype=torch.float64)
    seen = []

    def denoise(tokens, timestep):
        seen.append((tokens[2], float(schedule.sigma_of(timestep)[2])))
        return torch.zeros_like(tokens)

    held = hold(denoise, held_to, clean, schedule, "v")
    start = schedule.mix(clean, noise, schedule.sigmas(10)[0])  # not all noise on every schedule
    fields = {"schedule": schedule, "target": "v", "sampler": sampler, "num_steps": 10}
    found = sample(held, start, draw_noise=lambda step: fresh, **fields)
    torch.testing.assert_close(found[0], clean[0], rtol=0, atol=1e-6)
    if sampler != "ddpm":  # which draws anew
        tokens, sigma = next(look for look in seen if look[1] == pytest.approx(half))
        torch.testing.assert_close(tokens, schedule.mix(clean[2], noise[2], sigma), rtol=0, atol=1e-6)
