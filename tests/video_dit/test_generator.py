"""The generator: the same video whatever else is in the batch, progress, cancelling and clear errors."""

import json
from dataclasses import replace

import pytest
import torch
from random_pipeline import noise_u8, request, save_random_pipeline

from video_dit import conditions
from video_dit.diffusion.guidance import GuidanceOptions
from video_dit.diffusion.samplers import SAMPLERS
from video_dit.diffusion.schedules import LinearBetaSchedule, RectifiedFlow
from video_dit.generator import Generator, read_limits, video_to_u8
from video_dit.given_frames import encode_frames, given_latents
from video_dit.random import keyed_normal
from video_dit.requests import Edit


def test_a_video_does_not_depend_on_its_batch(generator):
    others = [request(seed=5, num_frames=1, height_px=64), request(seed=6, prompt="blue", guidance_scale=1.0)]
    (alone,) = generator([request(seed=4)])
    together = generator([*others, request(seed=4)])
    assert alone.shape == (5, 32, 48, 3)
    assert alone.dtype == torch.uint8
    assert [video.shape[0] for video in together] == [1, 5, 5]
    assert torch.equal(together[2], alone)
    assert alone.float().std() > 1


def test_seed_prompt_and_guidance_each_matter(generator):
    (first,) = generator([request()])
    assert torch.equal(generator([request()])[0], first)
    for other in (request(seed=1), request(prompt="a blue square"), request(guidance_scale=1.0)):
        assert not torch.equal(generator([other])[0], first)
    negative = generator([request(negative_prompt="a blue square")])[0]
    assert not torch.equal(negative, first)


def latents_of(generator, requests):
    """What is decoded, c t h w each: bytes hide small differences, or make them large."""
    with torch.inference_mode():
        complete = [generator.limits.complete(asked) for asked in requests]
        return generator._sample(complete, [given_latents(generator.vae, asked) for asked in complete])


def test_every_setting_reaches_the_model_and_no_other_sample(generator):
    settings = [
        {"guidance": GuidanceOptions(interval=(0.5, 1.0))},
        {"guidance": GuidanceOptions(rescale=0.7)},
        {"guidance": GuidanceOptions(zero_star=True)},
        {"guidance": GuidanceOptions(parallel=0.0, momentum=-0.5)},
        {"cache_threshold": 1e6},
    ]
    requests = [request(seed=4, **fields) for fields in settings]
    (plain,) = latents_of(generator, [request(seed=4)])
    together = latents_of(generator, [request(seed=4), *requests])
    torch.testing.assert_close(together[0], plain, rtol=0, atol=1e-5)
    for asked, video in zip(requests, together[1:], strict=True):
        (alone,) = latents_of(generator, [asked])
        torch.testing.assert_close(video, alone, rtol=0, atol=1e-5)
        assert (video - plain).abs().max() > 1e-4


def test_a_model_has_steps_and_a_scale_of_its_own(tmp_path):
    save_random_pipeline(tmp_path, num_steps=2, guidance_scale=1.5)
    generator = Generator.from_pretrained(str(tmp_path))
    asked = request(num_steps=None, guidance_scale=None)
    completed = generator.limits.complete(asked)
    assert (completed.num_steps, completed.guidance_scale) == (2, 1.5)
    assert generator.limits.complete(request(guidance_scale=0.0)) == request(guidance_scale=0.0)
    assert torch.equal(generator([asked])[0], generator([request(num_steps=2, guidance_scale=1.5)])[0])


def test_progress_is_told_and_raising_cancels(generator):
    told = []
    generator([request()], on_step=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]

    def cancel(done, total):
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generator([request()], on_step=cancel)


def test_limits_are_read_without_weights_and_name_the_fix(folder, generator):
    limits = read_limits(folder)
    assert limits == generator.limits
    assert limits.stride == (4, 16, 16)
    assert limits.fps == 8.0
    with pytest.raises(ValueError, match="num_frames=7 .*use 5 or 9"):
        limits.check(request(num_frames=7))
    with pytest.raises(ValueError, match="width_px=40 .*use 32 or 48"):
        generator([request(width_px=40)])
    with pytest.raises(ValueError, match="the same num_steps"):
        generator([request(), request(num_steps=4)])
    with pytest.raises(ValueError, match="guidance_scale=-1"):
        request(guidance_scale=-1)


def test_rounding_to_bytes():
    video = torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.7]).view(1, 1, 1, 5).expand(3, 1, 1, 5)
    assert video_to_u8(video)[0, 0, :, 0].tolist() == [0, 64, 128, 255, 255]


def test_the_schedule_is_the_folders(tmp_path):
    save_random_pipeline(tmp_path, fps=24.0)
    generator = Generator.from_pretrained(str(tmp_path))
    assert generator.sampling.schedule == RectifiedFlow(shift=1.0)
    assert generator.fps == 24.0


def test_a_published_scheduler_tells_its_shift(tmp_path):
    save_random_pipeline(tmp_path)
    published = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    published["prediction_type"] = "flow_prediction"
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    assert Generator.from_pretrained(str(tmp_path)).sampling.schedule == RectifiedFlow(shift=3.0)


def test_a_transformer_that_wants_images_is_refused_before_any_work(tmp_path):
    save_random_pipeline(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 36}))
    with pytest.raises(ValueError, match="in_channels=36, image_dim=None: must be the VAE's z_dim=4 and None"):
        read_limits(str(tmp_path))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_the_same_video_in_any_batch(generator, sampler):
    """Random ones too: their noise is keyed by seed and step."""
    wanted = request(seed=4, sampler=sampler)
    (alone,) = generator([wanted])
    together = generator([request(seed=5, num_frames=1, height_px=64, sampler=sampler), wanted])
    assert torch.equal(together[1], alone)
    if sampler == "ddpm":
        assert not torch.equal(generator([replace(wanted, sampler="ddim")])[0], alone)


def test_each_video_has_the_noise_levels_of_its_size(tmp_path):
    """A schedule of 6 tokens' shift: a video of twice as many is sampled as by one with that shift for all."""
    save_random_pipeline(tmp_path / "by_size", schedule=RectifiedFlow(shift=3.0, base_tokens=6))
    save_random_pipeline(tmp_path / "fixed", schedule=RectifiedFlow(shift=3.0 * 2**0.5))
    by_size, fixed = (Generator.from_pretrained(str(tmp_path / name)) for name in ("by_size", "fixed"))
    video, image = request(), request(num_frames=1)  # 12 and 6 tokens
    both = by_size([image, video])
    assert torch.equal(both[1], fixed([video])[0])
    assert not torch.equal(both[0], fixed([image])[0])
    assert by_size._sigmas(image).tolist() == RectifiedFlow(shift=3.0).sigmas(3).tolist()


@pytest.mark.parametrize("target", ["noise", "v"])
def test_models_of_other_targets_are_sampled_by_their_own_schedule(tmp_path, target):
    save_random_pipeline(tmp_path, schedule=LinearBetaSchedule(), target=target)
    generator = Generator.from_pretrained(str(tmp_path))
    assert generator.sampling.schedule == LinearBetaSchedule()
    assert generator.sampling.target == target
    (video,) = generator([request(sampler="ddim")])
    generator.sampling = replace(generator.sampling, target="data")
    assert not torch.equal(generator([request(sampler="ddim")])[0], video)


def test_editing_starts_from_the_video_with_that_much_noise(generator):
    frames = noise_u8(5)
    asked = conditions.edit(frames, sigma=0.5, prompt="a red circle", num_steps=3, seed=4)
    latents = encode_frames(generator.vae, frames)
    noise = keyed_normal(latents.shape, "generate", 4)
    assert generator._sigmas(asked).tolist() == pytest.approx([0.5, 1 / 3, 1 / 6, 0])
    torch.testing.assert_close(generator._start(asked, torch.tensor(0.5)), (latents + noise) / 2)
    (much,), (little,) = (generator([replace(asked, edit=Edit(frames=frames, sigma=s))]) for s in (1.0, 1e-3))
    assert torch.equal(much, generator([replace(asked, edit=None)])[0])  # nothing is kept
    decoded = video_to_u8(generator.vae.decode(latents[None])[0])
    assert (little.int() - decoded.int()).abs().float().mean() < 1  # nothing changes
    (alone,) = generator([asked])
    assert torch.equal(generator([request(), asked])[1], alone)
