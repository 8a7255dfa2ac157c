"""The whole way, small: every hop real, rows conserved, one worker like two, a killed run like an undisturbed one."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from runs import losses_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import media, store
from pipeline.errors import TrainingDivergedError
from pipeline.models import model_folder, open_model
from pipeline.train_video import train_video
from video_dit import weights
from video_dit.generator import read_limits

ROOT = Path(__file__).parents[2]


def test_rows_are_conserved_from_files_to_latents(chain, latents):
    clips = chain.clips()
    assert clips.counts == {"sources": 48, "clips": 48, "rejects": 0}
    assert latents.counts == {"clips": 48, "latents": 48, "rejects": 0}
    assert latents.read("latents", ["clip_id"]) == clips.read("clips", ["clip_id"])
    shapes = latents.read("latents", ["latents_shape"]).column(0).to_pylist()
    for (channels, *grid), clip in zip(shapes, clips.read("clips").to_pylist(), strict=True):
        assert channels == 16
        assert grid == [(clip["num_frames"] - 1) // 4 + 1, clip["height_px"] // 8, clip["width_px"] // 8]


def test_training_is_logged_and_ends_with_a_model_folder(model, recipe):
    losses = losses_of(model.run)
    assert len(losses) == recipe.video.optimizer.num_steps
    assert sum(losses[-3:]) < sum(losses[:3])
    fields = json.loads((Path(model.run.uri) / "metrics" / "train.jsonl").read_text().splitlines()[0])
    names = {"step", "loss", "grad_norm", "lr", "num_tokens", "num_samples", "step_s", "data_wait_s", "num_workers"}
    names |= {"checkpoint_stall_s", "time_s", "tokens_per_s", "mfu"}
    by_noise_level = {name for name in fields if name.startswith("sigma_")}
    assert set(fields) - by_noise_level == names
    assert by_noise_level <= {"sigma_0_0.2", "sigma_0.2_0.4", "sigma_0.4_0.6", "sigma_0.6_0.8", "sigma_0.8_1"}
    assert 0 < fields["loss"] <= max(fields[name] for name in by_noise_level)  # the mean over given tokens, too
    assert {path.name for path in Path(model.uri).iterdir()} == {
        "model_index.json",
        "transformer",
        "vae",
        "text_encoder",
        "scheduler",
    }
    assert read_limits(model.uri).stride == (4, 16, 16)
    assert open_model(model.run.uri) == open_model(model.uri) == model


def test_tensorboard_has_scalars_and_clips_that_play(model, latents):
    board = EventAccumulator(str(Path(model.run.uri) / "metrics"), {"images": 0, "scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(20))
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses_of(model.run), rel=1e-6)
    tags = board.Tags()["images"]
    assert len(tags) == 4
    captions = latents.read("latents", ["caption"]).column(0).to_pylist()
    for tag in tags:
        assert tag.split(": ")[1] in captions
        assert [event.step for event in board.Images(tag)] == [10, 20]
        event = board.Images(tag)[-1]
        with Image.open(io.BytesIO(event.encoded_image_string)) as gif:
            assert gif.format == "GIF"
            assert (gif.width, gif.height) == (event.width, event.height)


def test_samples_and_scores_are_published(chain, model):
    samples = chain.samples(model)
    videos = sorted(Path(samples.uri, "videos").glob("*.mp4")) + sorted(Path(samples.uri, "videos").glob("*.png"))
    assert len(videos) == samples.counts["videos"] == 4
    for path in videos:
        asked = json.loads(path.with_suffix(".json").read_text())
        frames = media.decode_frames(path.read_bytes())
        assert frames.shape == (asked["num_frames"], asked["height_px"], asked["width_px"], 3)
    scores = chain.scores(model)
    assert scores.counts == {"videos": 8}
    table = json.loads(Path(scores.uri, "scores.json").read_text())
    assert len(table["videos"]) == 8
    assert 0 <= table["scores"]["all"] <= 1


def test_a_second_call_is_a_lookup(chain, model):
    files = {path: path.stat().st_mtime_ns for path in Path(chain.storage).rglob("*") if path.is_file()}
    assert chain.model() == model
    assert {path: path.stat().st_mtime_ns for path in Path(chain.storage).rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("num_workers", [2, 4])
def test_any_number_of_workers_gives_the_same_losses_and_weights(latents, model, recipe, tmp_path, num_workers):
    workers = dataclasses.replace(recipe.workers, num_workers=num_workers, cpus_per_worker=1)
    run = train_video(recipe.video, workers, [latents], str(tmp_path))
    assert losses_of(run) == pytest.approx(losses_of(model.run), abs=1e-5)
    ours, theirs = (weights.read_state(uri, "transformer") for uri in (model_folder(run), model.uri))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4


def test_clips_longer_than_a_pack_are_shared_by_workers_or_rejected(latents, recipe, tmp_path):
    """Two workers share what one runs whole; those longer still are in REJECTS, and nothing is lost."""
    sizes = [
        (shape[1]) * (shape[2] // 2) * (shape[3] // 2) for shape in latents.read("latents")["latents_shape"].to_pylist()
    ]
    budget = sorted(sizes)[len(sizes) // 2] // 2 + 1  # with two processes, half of the clips fit
    runs = []
    for num_workers in (1, 2):
        plan = dataclasses.replace(recipe.video.plan, token_budget=budget, context_size=2)
        video = dataclasses.replace(recipe.video, plan=plan, held_out_share=0.0)
        workers = dataclasses.replace(recipe.workers, num_workers=num_workers, cpus_per_worker=1)
        runs.append(train_video(video, workers, [latents], str(tmp_path / str(num_workers))))
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-5)
    rejects = runs[0].read("rejects").to_pylist()
    assert {row["reason"] for row in rejects} == {"too_long"}
    assert runs[0].counts == {"step": 20, "samples": 48 - len(rejects), "rejects": len(rejects)}
    assert len(rejects) == sum(size > 2 * budget for size in sizes) > 0
    assert sum(budget < size <= 2 * budget for size in sizes) > 0


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clips(latents, recipe, tmp_path):
    diverging = dataclasses.replace(
        recipe.video, optimizer=dataclasses.replace(recipe.video.optimizer, learning_rate=1e30, warmup_steps=0)
    )
    workers = dataclasses.replace(recipe.workers, max_failures=0)
    with pytest.raises(TrainingDivergedError, match=r"step \d+: loss=.*samples: \w+"):
        train_video(diverging, workers, [latents], str(tmp_path))
    assert not list(tmp_path.glob("train_video/*/manifest.json"))


def test_a_config_that_does_not_fit_the_latents_says_what_to_set(latents, recipe, tmp_path):
    wrong = dataclasses.replace(recipe.video, dit=dataclasses.replace(recipe.video.dit, in_channels=8))
    with pytest.raises(ValueError, match=r"dit\.in_channels=8, .* set dit\.in_channels to 16"):
        train_video(wrong, recipe.workers, [latents], str(tmp_path))


def test_storage_that_workers_cannot_share_is_refused(latents, recipe):
    with pytest.raises(ValueError, match="local or shared folder, got 'memory://runs"):
        train_video(recipe.video, recipe.workers, [latents], "memory://runs")


def test_unknown_model_folder_is_named(tmp_path):
    from pipeline.errors import ManifestError

    with pytest.raises(ManifestError, match="nothing-here"):
        open_model(str(tmp_path / "nothing-here"))
    assert store.exists(str(tmp_path))
