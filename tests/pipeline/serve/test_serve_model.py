"""A real model folder, tiny and random, from a prompt over HTTP to a file: what the app holds beside Ray Serve."""

import io

import av
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from pipeline.serve.api import Service, create_api
from pipeline.serve.app import build_app
from pipeline.serve.config import ServeConfig
from pipeline.serve.jobs import JobStore
from pipeline.serve.worker import Worker
from video_dit.diffusion.schedules import RectifiedFlow
from video_dit.generator import GenerationRequest, Generator, SamplingConfig, read_limits, save_pipeline_parts
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.text import HashedWordConfig, HashedWordEncoder
from video_dit.vae import VideoVAE, VideoVAEConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """URL of a model folder of stride 4 x 8 x 8 at 8 fps."""
    url = str(tmp_path_factory.mktemp("model") / "tiny")
    torch.manual_seed(0)
    vae = VideoVAEConfig(
        base_dim=8,
        z_dim=4,
        dim_mult=(1, 2, 4),
        num_res_blocks=1,
        temperal_downsample=(True, True),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
        scale_factor_spatial=4,
    )
    dit = VideoDiTConfig(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=96,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    )
    VideoVAE(vae).save_pretrained(url)
    VideoDiT(dit).save_pretrained(url)
    save_pipeline_parts(url, HashedWordEncoder(HashedWordConfig()), SamplingConfig(schedule=RectifiedFlow(), fps=8.0))
    return url


def test_a_real_model_serves_what_it_generates(model, tmp_path):
    config = ServeConfig(model=model, storage=str(tmp_path), num_steps=3, height_px=32, width_px=48, seconds=1.0)
    build_app(config)  # the defaults suit the model
    jobs, generator = JobStore(config.database_url), Generator.from_pretrained(model)
    client = TestClient(create_api(Service(config=config, jobs=jobs, limits=read_limits(model))))
    refused = client.post("/v1/videos", json={"prompt": "a ball", "size": "36x32"}).json()["error"]
    assert (refused["param"], "width_px=36 is not a multiple of 8" in refused["message"]) == ("size", True)
    created = client.post("/v1/videos", json={"prompt": "a red ball", "seed": 3}).json()
    assert Worker(config, jobs, generator).run_one()
    video = client.get(f"/v1/videos/{created['id']}").json()
    assert (video["status"], video["num_frames"], video["fps"], video["steps_done"]) == ("completed", 9, 8.0, 3)
    path = f"/v1/videos/{created['id']}/content"
    with av.open(io.BytesIO(client.get(path).content)) as container:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert shapes == 9 * [(32, 48, 3)]
    request = GenerationRequest(
        prompt="a red ball", height_px=32, width_px=48, num_frames=9, num_steps=3, guidance_scale=4.0, seed=3
    )
    thumbnail = Image.open(io.BytesIO(client.get(path, params={"variant": "thumbnail"}).content))
    assert np.array_equal(thumbnail, generator([request])[0][4].numpy())  # PNG loses nothing
    jobs.close()
