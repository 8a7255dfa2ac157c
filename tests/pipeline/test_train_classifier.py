"""Classifier training: labels from captions, the held-out split, keyed noise, a falling loss, a whole run on Ray."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from random_pipeline import save_random_pipeline

from pipeline import store
from pipeline.evaluate import EvaluateConfig, LedByClassifier, evaluate_video
from pipeline.models import Model, model_folder
from pipeline.plan import Plan, PlanConfig
from pipeline.toy_scenes import VALUES, caption, parse_caption, select_scenes
from pipeline.train import WorkersConfig
from pipeline.train_classifier import (
    MEASURED_SIGMAS,
    ClassifierTask,
    TrainClassifierConfig,
    caption_labels,
    is_held_out,
    read_accuracy,
    train_classifier,
)
from video_dit.classifier import UNKNOWN, LatentClassifier, LatentClassifierConfig
from video_dit.diffusion.losses import DiffusionConfig
from video_dit.generator import GenerationRequest, Generator
from video_dit.random import keyed_normal
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import OptimizerConfig, SingleProcess, TrainState

CONFIG = TrainClassifierConfig(
    model=LatentClassifierConfig(
        classes=VALUES,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        freq_dim=16,
        ffn_dim=48,
        num_layers=1,
    ),
    diffusion=DiffusionConfig(times="uniform"),
    plan=PlanConfig(token_budget=64, packs_per_step=2),
    optimizer=OptimizerConfig(learning_rate=2e-2, num_steps=100, warmup_steps=5, ema_decay=0.9),
    held_out_share=0.25,
)
IMAGES, VIDEOS = (select_scenes(images=images, held_out=False) for images in (True, False))
SCENES = [IMAGES[8 * (number // 5)] if number % 5 == 0 else VIDEOS[27 * number] for number in range(60)]


def latents_row(number, channels=4, words=None):
    """Latents that show the colour and the background alone, in an image or a video."""
    scene = SCENES[number]
    shape = (channels, 1 if scene.is_image else 2, 2, 4)
    values = np.zeros(shape, np.float16)
    values[0] = list(VALUES["colour"]).index(scene.colour) - 2.5
    values[1] = 2 * (list(VALUES["background"]).index(scene.background) - 1)
    return {
        "clip_id": f"clip{number}",
        "latents": values.tobytes(),
        "latents_std": None,
        "latents_shape": list(shape),
        "text": np.zeros((2, 3), np.float16).tobytes(),
        "text_shape": [2, 3],
        "caption": caption(scene, number) if words is None else words,
        "fps": 8.0,
        "decode_backend": "decord",
        "lineage": {"source_id": "", "caption_source": "sidecar"},
    }


def publish(folder, **options):
    def produce(uri):
        rows = [latents_row(number, **options) for number in range(60)]
        files = [store.write_shard(uri, "latents", rows)]
        return store.Produced(counts={"latents": 60}, files={"latents": files})

    return store.publish_once(str(folder), "encode", "test", {}, [], produce)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def trainee(latents):
    torch.manual_seed(0)
    return ClassifierTask(latents_uris=(latents.uri,), config=CONFIG).build()


def test_captions_tell_the_labels():
    captions = [
        "a small red circle moves quickly up and to the right on a black background",
        "a large cyan square stays still on a white background",
        "a picture of a small blue triangle on a gray background",
    ]
    found = caption_labels(CONFIG.model, captions)
    assert list(VALUES) == ["colour", "shape", "size", "background", "direction", "speed"]
    assert found.tolist() == [[0, 0, 0, 0, 5, 1], [4, 1, 1, 2, 0, UNKNOWN], [2, 2, 0, 1, UNKNOWN, UNKNOWN]]
    with pytest.raises(ValueError, match="'a cat' names no colour"):
        caption_labels(CONFIG.model, ["a cat"])


def test_clips_are_trained_on_or_measured_by_their_ids(trainee):
    assert trainee.measured == [place for place in range(60) if is_held_out(f"clip{place}", 0.25)]
    planned = [place for step in Plan(trainee.samples, CONFIG.plan).epoch(0) for pack in step.packs for place in pack]
    assert sorted(planned + trainee.measured) == list(range(60))
    assert trainee.sample_ids((0, 2)) == ("clip0", "clip2")
    assert sum(is_held_out(str(number), 0.1) for number in range(2000)) == pytest.approx(200, abs=3 * 180**0.5)


def test_a_batch_is_what_the_diffusion_model_would_see_with_labels(trainee):
    batch = trainee.load(3, (0, 1, 5))
    for noisy, label, place in zip(batch.packed.unpack(batch.packed.tokens), batch.labels, (0, 1, 5), strict=True):
        data, scene = trainee.data[place].latents, SCENES[place]
        noise = keyed_normal(data.shape, 0, 3, f"clip{place}", "noise")
        sigma = ((noisy - data) / (noise - data)).median()
        torch.testing.assert_close(noisy, (1 - sigma) * data + sigma * noise, rtol=0, atol=1e-4)
        assert VALUES["colour"][label[0]] == scene.colour
        assert (label[4] == UNKNOWN) == scene.is_image
        assert (label[5] == UNKNOWN) == (scene.speed is None)
    assert trainee.num_elements(3, (0, 1, 5)) == 3


def test_training_learns_what_the_latents_show_and_no_more(trainee, tmp_path):
    state = TrainState(trainee.model, CONFIG.optimizer, SingleProcess())
    losses = []
    for number, step in Plan(trainee.samples, CONFIG.plan).steps():
        if number == CONFIG.optimizer.num_steps:
            break
        batches = [MicroBatch(inputs=trainee.load(number, pack), weight=1.0, sample_ids=()) for pack in step.packs]
        num_elements = sum(trainee.num_elements(number, pack) for pack in step.packs)
        losses.append(train_step(state, batches, trainee.loss_function, num_elements)["loss"])
    assert np.mean(losses[-5:]) < np.mean(losses[:2]) - 1.0
    figures = trainee.export(str(tmp_path), state.ema)
    assert figures["accuracy_background_at_0.1"] > 0.9
    assert figures["accuracy_colour_at_0.1"] > 0.5 > figures["accuracy_colour_at_0.9"]
    assert figures["accuracy_direction_at_0.1"] < 0.5  # nothing shows it
    assert (figures["num_samples"], figures["num_held_out"]) == (60 - len(trainee.measured), len(trainee.measured))
    table = json.loads((tmp_path / "accuracy.json").read_text())
    assert list(table) == list(VALUES)
    assert list(table["colour"]) == [str(sigma) for sigma in MEASURED_SIGMAS]
    assert trainee.accuracy(LatentClassifier.from_pretrained(str(tmp_path))) == table


def test_errors_name_the_field(latents, tmp_path):
    with pytest.raises(ValueError, match=r"model\.classes\['taste'\]=.*: must be an attribute of the toy world"):
        TrainClassifierConfig(model=LatentClassifierConfig(classes={"taste": ("sweet", "sour")}))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"held_out_share={share}: must be between 0 and 1"):
            TrainClassifierConfig(held_out_share=share)
    with pytest.raises(ValueError, match="classifier_scale=-1"):
        EvaluateConfig(classifier_scale=-1)
    workers = WorkersConfig()
    wrong = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, in_channels=8))
    with pytest.raises(ValueError, match=r"model\.in_channels=8, but .* set model\.in_channels to 4"):
        train_classifier(wrong, workers, [latents], str(tmp_path))
    few = dataclasses.replace(CONFIG, held_out_share=1e-9)
    with pytest.raises(ValueError, match="held_out_share=1e-09: 0 of 60 clips are held out"):
        train_classifier(few, workers, [latents], str(tmp_path))
    with pytest.raises(ValueError, match="caption 'a dog' names no colour"):
        train_classifier(CONFIG, workers, [publish(tmp_path, words="a dog")], str(tmp_path))
    assert not store.exists(str(tmp_path / "train_classifier"))


def test_prompts_are_classes_to_the_classifier(trainee, tmp_path):
    save_random_pipeline(tmp_path)
    trainee.export(str(tmp_path), trainee.model.state_dict())
    generator = Generator.from_pretrained(str(tmp_path))
    requests = [
        GenerationRequest(prompt=caption(SCENES[0], 0), num_frames=1, height_px=32, width_px=32, num_steps=2, seed=seed)
        for seed in range(2)
    ]
    make = LedByClassifier(classifier_uri=str(tmp_path), scale=0.0)
    untold = [dataclasses.replace(request, prompt="", guidance_scale=1.0) for request in requests]
    for video, expected in zip(make(generator, requests), generator(untold), strict=True):
        assert torch.equal(video, expected)


def test_a_run_on_ray_ends_with_a_classifier_that_evaluation_takes(ray_cluster, latents, tmp_path):
    few = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, num_steps=4))
    workers = WorkersConfig(num_workers=2, cpus_per_worker=1, checkpoint_every=2)
    run = train_classifier(few, workers, [latents], str(tmp_path))
    report = json.loads(Path(run.uri, "report.json").read_text())
    table = read_accuracy(run)
    for name, row in table.items():
        assert row == {str(sigma): report[f"accuracy_{name}_at_{sigma}"] for sigma in MEASURED_SIGMAS}
    assert run.parents == [{"uri": latents.uri, "hash": latents.hash}]
    assert LatentClassifier.from_pretrained(model_folder(run)).config == CONFIG.model
    save_random_pipeline(tmp_path / "model")
    model = Model(uri=str(tmp_path / "model"), run=None)
    config = EvaluateConfig(num_prompts=2, classifier=run.uri, classifier_scale=2.0)
    config = dataclasses.replace(config, generate=dataclasses.replace(config.generate, num_steps=2, num_actors=1))
    with pytest.raises(FileNotFoundError, match="classifier/config.json"):
        evaluate_video(dataclasses.replace(config, classifier=model.uri), model, str(tmp_path))
    scores = evaluate_video(config, model, str(tmp_path))
    assert scores.parents == [{"uri": run.uri, "hash": run.hash}]
    rows = json.loads(Path(scores.uri, "scores.json").read_text())["videos"]
    assert [parse_caption(row["prompt"]).colour in VALUES["colour"] for row in rows] == [True, True]
