"""The generator: the same video whatever else is in the batch, progress, cancelling and clear errors."""

import json

import pytest
import torch

from video_dit.diffusion.schedules import RectifiedFlow
from video_dit.generator import GenerationRequest, Generator, read_limits, save_pipeline_parts, video_to_u8
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.text import HashedWordConfig, HashedWordEncoder
from video_dit.vae import VideoVAE, VideoVAEConfig


def save_random_pipeline(folder, fps=8.0):
    """A whole model folder with random weights, a few thousand of them."""
    torch.manual_seed(0)
    text = HashedWordEncoder(HashedWordConfig(dim=24, position_dim=8))
    vae = VideoVAE(
        VideoVAEConfig(
            base_dim=4,
            z_dim=4,
            dim_mult=(1, 2, 2),
            num_res_blocks=1,
            temperal_downsample=(True, True),
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        )
    )
    dit = VideoDiT(
        VideoDiTConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
        )
    )
    torch.nn.init.normal_(dit.head.out.weight, std=0.5)
    vae.save_pretrained(str(folder))
    dit.save_pretrained(str(folder))
    save_pipeline_parts(str(folder), text, shift=1.0, fps=fps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_random_pipeline(folder)
    return str(folder)


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.from_pretrained(folder)


def request(seed=0, **changes):
    fields = {"prompt": "a red circle", "height_px": 32, "width_px": 48, "num_frames": 5, "num_steps": 3}
    return GenerationRequest(**{**fields, "seed": seed, **changes})


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
    assert generator.schedule == RectifiedFlow(shift=1.0)
    assert generator.fps == 24.0


def test_a_published_scheduler_tells_its_shift(tmp_path):
    save_random_pipeline(tmp_path)
    published = {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "flow_shift": 3.0}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    assert Generator.from_pretrained(str(tmp_path)).schedule == RectifiedFlow(shift=3.0)


def test_a_transformer_that_wants_images_is_refused_before_any_work(tmp_path):
    save_random_pipeline(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 36}))
    with pytest.raises(ValueError, match="in_channels=36, image_dim=None: must be the VAE's z_dim=4 and None"):
        read_limits(str(tmp_path))
