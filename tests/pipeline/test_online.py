"""Training while clips are encoded: nothing is stored, and it is the same training."""

import dataclasses
from pathlib import Path

import pytest
import torch
from runs import losses_of

from pipeline.errors import ManifestError
from pipeline.feed import LatentDataset
from pipeline.latent_training import latents_of
from pipeline.models import Model, model_folder
from pipeline.online import OnlineDataset
from pipeline.train_video import train_video
from video_dit.shapes import Stride


@pytest.fixture(scope="module")
def encoder(chain):
    return chain.encoder()


@pytest.fixture(scope="module")
def stored(latents):
    return LatentDataset(latents)


@pytest.fixture
def online(chain, encoder):
    return OnlineDataset(encoder.uri, chain.clips())


def assert_close(sample, other):
    assert sample.clip_id == other.clip_id
    torch.testing.assert_close(
        sample.latents, other.latents, rtol=0, atol=0.02
    )  # alone instead of in a batch, in float16
    torch.testing.assert_close(sample.text, other.text)


def test_it_looks_like_the_stored_data_set(online, stored):
    assert (online.clip_ids, online.captions, online.shapes, online.fps) == (
        stored.clip_ids,
        stored.captions,
        stored.shapes,
        stored.fps,
    )
    for ours, theirs in zip(online.samples(Stride(1, 2, 2), 0.1), stored.samples(Stride(1, 2, 2), 0.1), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert_close(online[7], stored[7])


def test_samples_come_in_the_order_that_was_told(ray_cluster, online, stored):
    order = [5, 11, 3, 5, 40, 7, 1, 2, 29, 13]
    online.begin(iter(order))
    for place in order:
        assert_close(online[place], stored[place])
    with pytest.raises(StopIteration):
        online[0]


def test_another_order_is_refused(ray_cluster, online):
    online.begin(iter([5, 6]))
    with pytest.raises(AssertionError, match="sample 6 was asked for, 5 was to come"):
        online[6]


def test_a_run_trains_as_on_stored_latents(chain, recipe, encoder, model, tmp_path):
    video = dataclasses.replace(recipe.video, online_actors=1)
    run = train_video(video, recipe.workers, [chain.clips()], str(tmp_path), encoder=encoder)
    assert losses_of(run) == pytest.approx(losses_of(model.run), abs=5e-3)
    assert not list(Path(tmp_path).glob("encode"))
    assert Path(model_folder(run), "vae").exists()
    with pytest.raises(ManifestError, match="kept no latents"):
        latents_of(Model(uri=model_folder(run), run=run))


def test_encoder_and_number_of_processes_go_together(chain, recipe, latents, encoder, tmp_path):
    with pytest.raises(ValueError, match="online_actors=0: must be positive with an encoder"):
        train_video(recipe.video, recipe.workers, [chain.clips()], str(tmp_path), encoder=encoder)
    online = dataclasses.replace(recipe.video, online_actors=2)
    with pytest.raises(ValueError, match="online_actors=2: .* 0 without"):
        train_video(online, recipe.workers, [latents], str(tmp_path))
