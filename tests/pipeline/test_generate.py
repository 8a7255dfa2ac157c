"""Batch generation on a cluster: long videos from files, as the generator makes them, beside what they began with."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from random_pipeline import noise_u8, save_random_pipeline

from pipeline import media
from pipeline.generate import GenerateConfig, generate, sample_video
from pipeline.given import GivenConfig
from pipeline.models import Model
from pipeline.request_files import from_json
from video_dit.generator import Generator, read_limits
from video_dit.long_videos import long_videos


def test_given_files_reach_the_videos_and_stay_beside_them(ray_cluster, tmp_path):
    save_random_pipeline(tmp_path / "model")
    uri, image = str(tmp_path / "model"), noise_u8(1, height_px=32, width_px=32)
    (tmp_path / "image.png").write_bytes(media.encode_png(image[0].numpy()))
    config = GenerateConfig(num_steps=2, window_frames=9, overlap_frames=5, num_actors=1, sampler="heun")
    plain = [config.request(number, "a red circle", 13, 32, 32) for number in range(2)]
    requests = GivenConfig(begin=str(tmp_path / "image.png")).put_into(plain, read_limits(uri))
    model = Model(uri=uri, run=None)
    samples = sample_video(config, requests, model, str(tmp_path / "runs"))
    folder = Path(samples.uri)
    assert len(list((folder / "frames").iterdir())) == 1
    fields = json.loads((folder / "videos" / "001.json").read_text())
    asked = from_json(fields, lambda name: (folder / name).read_bytes())
    assert torch.equal(asked.conditions[0].frames, image)
    assert (asked.seed, asked.sampler, asked.num_frames) == (1, "heun", 13)
    (expected,) = long_videos(Generator.from_pretrained(uri), [asked], 9, 5)
    assert (folder / "videos" / "001.mp4").read_bytes() == media.encode_mp4(expected.numpy(), 8.0)
    assert torch.equal(expected[:1], image)
    assert sample_video(config, requests, model, str(tmp_path / "runs")) == samples
    wrong = dataclasses.replace(config, overlap_frames=6)
    with pytest.raises(ValueError, match="overlap_frames=6: must be 1"):
        sample_video(wrong, requests, model, str(tmp_path / "runs"))


def test_videos_do_not_depend_on_batches_and_processes(ray_cluster, tmp_path):
    save_random_pipeline(tmp_path / "model")
    config = GenerateConfig(num_steps=2, requests_per_batch=3, num_actors=1)
    sizes = [(5, 32, 48), (1, 32, 32), (9, 48, 32)]
    requests = [config.request(number, f"a red circle {number}", *size) for number, size in enumerate(sizes)]
    alone = dataclasses.replace(config, requests_per_batch=1, num_actors=2)
    folders = [tmp_path / "together", tmp_path / "alone"]
    for folder, how in zip(folders, (config, alone), strict=True):
        generate(how, requests, str(tmp_path / "model"), str(folder))
    for name in ("000.mp4", "001.png", "002.mp4"):
        first, second = (media.decode_frames((folder / "videos" / name).read_bytes()) for folder in folders)
        difference = abs(first.astype(int) - second.astype(int))
        assert difference.max() <= 2  # 1e-5 of a latent may round to the next byte
        assert difference.mean() < 0.05
