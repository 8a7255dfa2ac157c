"""Guidance against its closed forms, diffusers' guiders, and one sample alone against the same one in a pack."""

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance

from video_dit.diffusion.guidance import Guidance, GuidanceOptions, Samples, classifier_free
from video_dit.diffusion.schedules import LinearBetaSchedule, RectifiedFlow
from video_dit.diffusion.targets import TARGETS, estimate, target_of

LENGTHS = [3, 7, 2]
HALF = RectifiedFlow().level(0.5)


def tokens(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 4, generator=generator, dtype=torch.float64)


def guide(scales, options, target="velocity", level=HALF, lengths=LENGTHS, cut=slice(None)):
    guidance = Guidance(scales, options, lengths, target)
    return guidance(tokens(1)[cut], tokens(2)[cut], tokens(3)[cut], level)


def by_sample(values):
    return values.split(LENGTHS)


def test_guidance_one_is_conditional_and_zero_unconditional():
    conditional, unconditional = tokens(1), tokens(2)
    torch.testing.assert_close(classifier_free(conditional, unconditional, torch.tensor(1.0)), conditional)
    assert torch.equal(classifier_free(conditional, unconditional, torch.tensor(0.0)), unconditional)
    twice = classifier_free(conditional, unconditional, torch.tensor(2.0))
    torch.testing.assert_close(twice - conditional, conditional - unconditional)


def test_sums_are_those_of_each_sample():
    samples, values = Samples(LENGTHS), tokens()
    for start, part in zip((0, 3, 10), by_sample(values), strict=True):
        assert samples.sum(values)[start, 0].item() == pytest.approx(part.sum().item())
        assert samples.std(values)[start, 0].item() == pytest.approx(part.std(correction=0).item())


def apg(**options):
    """Diffusers' APG at the paper's scale 3: there the conditional prediction itself is scale 0."""
    return AdaptiveProjectedGuidance(guidance_scale=2.0, use_original_formulation=True, **options)


PEERS = {
    "rescale": (GuidanceOptions(rescale=0.7), ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.7)),
    "zero star": (
        GuidanceOptions(zero_star=True),
        ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=0),
    ),
    "projected": (
        GuidanceOptions(parallel=0.2, max_norm=2.5),
        apg(eta=0.2, adaptive_projected_guidance_rescale=2.5),
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_each_sample_gets_what_diffusers_gives_it_alone(name):
    option, peer = PEERS[name]
    peer.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(500))
    ours = guide([3.0] * 3, [option] * 3, target="data")
    for our, conditional, unconditional in zip(
        by_sample(ours), by_sample(tokens(2)), by_sample(tokens(3)), strict=True
    ):
        theirs = peer.forward(conditional[None], unconditional[None]).pred[0]
        torch.testing.assert_close(our, theirs, rtol=0, atol=2e-2 if name == "rescale" else 1e-6)  # Bessel there


def test_momentum_is_that_of_diffusers():
    peer = apg(eta=0.0, adaptive_projected_guidance_rescale=100.0, adaptive_projected_guidance_momentum=-0.5)
    ours = Guidance([3.0], [GuidanceOptions(parallel=0.0, max_norm=100.0, momentum=-0.5)], [7], "data")
    for step in range(3):
        peer.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(500))
        if step == 0:
            peer.prepare_inputs({})  # makes its buffer
        x, conditional, unconditional = (tokens(seed + step, [7]) for seed in (10, 20, 30))
        theirs = peer.forward(conditional[None], unconditional[None]).pred[0]
        torch.testing.assert_close(ours(x, conditional, unconditional, HALF), theirs, rtol=0, atol=1e-6)


def test_samples_of_a_pack_are_guided_as_if_alone():
    options = [GuidanceOptions(), GuidanceOptions(parallel=0.0, rescale=0.5), GuidanceOptions(zero_star=True)]
    together = guide([2.0, 3.0, 4.0], options)
    start = 0
    for scale, option, length, part in zip([2.0, 3.0, 4.0], options, LENGTHS, by_sample(together), strict=True):
        alone = guide([scale], [option], lengths=[length], cut=slice(start, start + length))
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-12)
        start += length


@pytest.mark.parametrize("target", TARGETS)
def test_projection_is_of_the_data_whatever_is_predicted(target):
    level = LinearBetaSchedule().level(0.6)
    x, conditional, unconditional = tokens(1), tokens(2), tokens(3)
    predictions = [
        target_of(data, (x - level.alpha * data) / level.sigma, target, level) for data in (conditional, unconditional)
    ]
    options = [GuidanceOptions(parallel=0.0, max_norm=1.5)] * 3
    guided = Guidance([3.0] * 3, options, LENGTHS, target)(x, *predictions, level)
    expected = Guidance([3.0] * 3, options, LENGTHS, "data")(x, conditional, unconditional, level)
    torch.testing.assert_close(estimate(x, guided, target, level).data, expected)
    for part, data in zip(by_sample(expected - conditional), by_sample(conditional), strict=True):
        assert (part * data).sum().abs() < 1e-9
        assert part.norm() <= 2 * 1.5 + 1e-9


def test_there_is_guidance_in_the_interval_only():
    options = [GuidanceOptions(interval=(0.2, 0.8)), GuidanceOptions(), GuidanceOptions(interval=(0.0, 0.4))]
    guidance = Guidance([3.0, 3.0, 3.0], options, LENGTHS, "velocity")
    starts = [0, 3, 10]
    for sigma, expected in ((0.9, [1, 3, 1]), (0.5, [3, 3, 1]), (0.1, [1, 3, 3])):
        assert guidance.scale_at(torch.tensor(sigma))[starts, 0].tolist() == expected
    early = Guidance([3.0], options[2:], [2], "velocity")
    assert not early.is_needed(torch.tensor(0.9))
    assert early.is_needed(torch.tensor(0.3))
    assert not Guidance([1.0], [GuidanceOptions()], [2], "velocity").is_needed(torch.tensor(0.3))


def test_zero_init_stands_still_at_the_start():
    guidance = Guidance([2.0] * 2, [GuidanceOptions(zero_above=1.0), GuidanceOptions()], [3, 7], "velocity")
    flow, x, prediction = RectifiedFlow(), tokens(1)[:10], tokens(2)[:10]
    first = guidance.start_from_rest(x, prediction, flow.level(1.0))
    assert torch.equal(first[:3], torch.zeros(3, 4, dtype=torch.float64))
    assert torch.equal(first[3:], prediction[3:])
    assert guidance.start_from_rest(x, prediction, flow.level(0.98)) is prediction


def test_errors_name_the_field():
    for field, value in (("interval", (0.8, 0.2)), ("rescale", 2.0), ("max_norm", 0.0), ("momentum", -1.0)):
        with pytest.raises(ValueError, match=f"{field}="):
            GuidanceOptions(**{field: value})
