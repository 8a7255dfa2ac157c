"""A distillation run, small: what it leaves behind, one worker like two, a cut one like an undisturbed one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import losses_of

from pipeline.distill_video import distill_video
from pipeline.errors import ManifestError
from pipeline.models import Model, model_folder, open_model
from video_dit import weights
from video_dit.generator import read_limits

LOSSES = {"distillation", "adversarial", "discriminator", "r1"}


def rows_of(run):
    return [json.loads(line) for line in (Path(run.uri) / "metrics" / "train.jsonl").read_text().splitlines()]


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def student(chain, model):
    before = files_of(model.uri)
    student = chain.student()
    assert files_of(model.uri) == before  # the teacher's
    return student


def test_a_run_logs_every_loss_and_ends_with_a_model_folder_that_tells_how_to_sample(student, model, recipe):
    rows = rows_of(student.run)
    assert len(rows) == recipe.distill.optimizer.num_steps
    assert {"grad_norm", "grad_norm_heads", "lr", "lr_heads", *LOSSES} < set(rows[0])
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[name] for name in LOSSES), abs=1e-6)
    assert [parent["uri"] for parent in student.run.parents] == [model.run.uri]
    assert {path.name for path in Path(student.uri).iterdir()} == {path.name for path in Path(model.uri).iterdir()}
    theirs, ours = (
        json.loads(Path(uri, "scheduler", "scheduler_config.json").read_text()) for uri in (model.uri, student.uri)
    )
    assert ours == {**theirs, "num_inference_steps": 4, "guidance_scale": 1.0}
    limits = read_limits(student.uri)
    assert (limits.num_steps, limits.guidance_scale) == (4, 1.0)
    assert dataclasses.replace(limits, guidance_scale=recipe.video.guidance_scale) == read_limits(model.uri)
    old, new = (weights.read_state(uri, "transformer") for uri in (model.uri, student.uri))
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert open_model(student.run.uri) == student


def test_two_workers_give_the_same_losses_and_weights(student, model, recipe, tmp_path):
    workers = dataclasses.replace(recipe.workers, num_workers=2, cpus_per_worker=1)
    run = distill_video(recipe.distill, workers, model, str(tmp_path))
    for row, expected in zip(rows_of(run), rows_of(student.run), strict=True):
        assert {name: row[name] for name in LOSSES} == pytest.approx(
            {name: expected[name] for name in LOSSES}, abs=1e-5
        )
    ours, theirs = (weights.read_state(uri, "transformer") for uri in (model_folder(run), student.uri))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-4


def test_a_run_cut_after_a_checkpoint_goes_on_to_the_same_end(student, model, recipe, tmp_path):
    folder = tmp_path / "distill_video" / Path(student.run.uri).name
    shutil.copytree(student.run.uri, folder)
    shutil.rmtree(folder / "checkpoints" / "step-10")
    shutil.rmtree(folder / "models")
    (folder / "manifest.json").unlink()
    run = distill_video(recipe.distill, recipe.workers, model, str(tmp_path))
    assert Path(run.uri) == folder
    assert losses_of(run) == losses_of(student.run)  # to the last bit
    ours, theirs = (weights.read_state(uri, "transformer") for uri in (model_folder(run), student.uri))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_student_is_shown_in_its_few_steps(chain, student):
    assert chain.distill_and_show() == student.run
    for verb in ("sample_video", "evaluate_video"):
        made = list(Path(chain.storage, verb).glob(f"{student.name}-*/videos/*.json"))
        asked = [json.loads(path.read_text()) for path in made]
        assert {(request["num_steps"], request["guidance_scale"]) for request in asked} == {(4, 1.0)}


def test_a_teacher_must_be_a_run_of_train_video(chain, model, recipe, tmp_path):
    with pytest.raises(ManifestError, match="is a run of train_vae: give the folder of a finished run of train_video"):
        distill_video(recipe.distill, recipe.workers, Model(uri=model.uri, run=chain.vae()), str(tmp_path))
    with pytest.raises(ManifestError, match="no run is known"):
        distill_video(recipe.distill, recipe.workers, Model(uri=model.uri, run=None), str(tmp_path))
