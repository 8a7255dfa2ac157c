"""A training run loses workers, its driver, its machine: the same losses and the same weights in the end, to the bit.

KINORAY_TRAIN_KILLS is the number of SIGKILLs of workers (default 5).
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import losses_of, train_workers

from pipeline.errors import TrainingStoppedError
from pipeline.models import model_folder
from pipeline.train_vae import train_vae
from pipeline.train_video import train_video
from video_dit import weights
from video_dit.parallel.checkpoint import committed
from video_dit.parallel.failpoints import ONCE, VARIABLE

ROOT = Path(__file__).parents[2]
NUM_KILLS = int(os.environ.get("KINORAY_TRAIN_KILLS", "5"))
NUM_STEPS = max(60, 4 * NUM_KILLS)


@pytest.fixture(scope="module")
def video(recipe):
    """Steps for kills to fall between."""
    optimizer = dataclasses.replace(recipe.video.optimizer, num_steps=NUM_STEPS)
    return dataclasses.replace(recipe.video, optimizer=optimizer)


@pytest.fixture(scope="module")
def workers(recipe):
    return dataclasses.replace(
        recipe.workers, num_workers=2, cpus_per_worker=1, checkpoint_every=6, show_every=1000, max_failures=1000
    )


@pytest.fixture(scope="module")
def undisturbed(video, workers, latents, tmp_path_factory):
    return train_video(video, workers, [latents], str(tmp_path_factory.mktemp("undisturbed")))


def assert_same(run, other, component="transformer"):
    assert losses_of(run) == losses_of(other)  # to the last bit
    ours, theirs = (weights.read_state(model_folder(one), component) for one in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def last_step(storage):
    files = list(Path(storage).glob("train_video/*/metrics/train.jsonl"))
    lines = files[0].read_text().split("\n")[:-1] if files else []
    return json.loads(lines[-1])["step"] if lines else -1


class Background:
    """A training run in a thread."""

    def __init__(self, *args):
        self.run = self.error = None
        self._thread = threading.Thread(target=self._train, args=args)
        self._thread.start()

    def _train(self, *args):
        try:
            self.run = train_video(*args)
        except BaseException as error:
            self.error = error

    @property
    def is_running(self):
        return self._thread.is_alive()

    def result(self):
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.run


def test_workers_killed_at_random_moments_change_no_bit(video, workers, latents, undisturbed, tmp_path):
    chance = random.Random(0)
    moments = sorted(chance.sample(range(video.optimizer.num_steps - 2), NUM_KILLS))
    training, num_kills = Background(video, workers, [latents], str(tmp_path)), 0
    while training.is_running:
        time.sleep(0.01)
        if moments and last_step(tmp_path) >= moments[0]:
            time.sleep(chance.random() * 0.2)
            victims = train_workers()
            if victims:
                chance.choice(victims).kill()
                moments.pop(0)
                num_kills += 1
    run = training.result()
    sys.stdout.write(f"{num_kills} kills of a worker\n")
    assert num_kills >= NUM_KILLS - 1  # the last moment may come too late
    assert_same(run, undisturbed)


def test_death_at_places_of_the_loop_changes_no_bit(video, workers, latents, undisturbed, tmp_path, monkeypatch):
    """One after the other, in one run."""
    marks = tmp_path / "marks"
    marks.mkdir()
    places = ["after_save:2", "data_prefetch_full:4", "mid_allreduce:30"]
    monkeypatch.setenv(VARIABLE, ",".join(places))
    monkeypatch.setenv(ONCE, str(marks))
    run = train_video(video, workers, [latents], str(tmp_path))
    assert sorted(path.name for path in marks.iterdir()) == sorted(places)
    assert_same(run, undisturbed)


def test_a_driver_is_stopped_and_the_next_one_killed_and_the_last_one_ends_the_same(
    video, workers, latents, undisturbed, tmp_path
):
    """SIGTERM, and a worker dies while it saves; SIGKILL with all its processes, as when the machine goes down."""

    def resume(how):
        return train_video(video, dataclasses.replace(workers, resume=how), [latents], str(tmp_path))

    with pytest.raises(ValueError, match="resume='must': .* holds no checkpoint"):
        resume("must")
    (tmp_path / "marks").mkdir()
    child = driver_of(latents, tmp_path)
    while last_step(tmp_path) < 4:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=120)
    assert TrainingStoppedError.__name__ in errors
    assert (tmp_path / "marks" / "sigterm_grace").exists()
    (checkpoints,) = tmp_path.glob("train_video/*/checkpoints")
    reached = committed(str(checkpoints))[0].step
    assert reached == last_step(tmp_path) + 1
    with pytest.raises(
        ValueError, match=rf"resume='never': .* has a checkpoint of step {reached}; use 'auto' or delete it"
    ):
        resume("never")

    child = driver_of(latents, tmp_path)
    while last_step(tmp_path) < reached:
        assert child.poll() is None
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert not list(tmp_path.glob("train_video/*/manifest.json"))
    assert_same(resume("must"), undisturbed)


def test_a_vae_that_dies_on_videos_goes_on_from_a_checkpoint_of_images(recipe, chain, tmp_path, monkeypatch):
    """Its kernels over time have had no gradient there."""
    assert recipe.workers.checkpoint_every < recipe.vae.image_steps < recipe.vae.optimizer.num_steps
    undisturbed, clips = chain.vae(), chain.clips()
    monkeypatch.setenv(VARIABLE, "before_stage:2")
    monkeypatch.setenv(ONCE, str(tmp_path))
    run = train_vae(recipe.vae, recipe.workers, clips, str(tmp_path / "runs"))
    assert (tmp_path / "before_stage:2").exists()
    assert_same(run, undisturbed, "vae")


def driver_of(latents, storage):
    """The same run as a process with a cluster of its own, of which a worker dies when it is to stop."""
    script = (
        "import dataclasses, sys; from jobs.recipes import smoke_cpu; from pipeline import cluster, store\n"
        "from pipeline.train_video import train_video\n"
        "cluster.connect(num_cpus=2, address='local', include_dashboard=False); recipe = smoke_cpu()\n"
        "optimizer = dataclasses.replace(recipe.video.optimizer, num_steps=int(sys.argv[3]))\n"
        "video = dataclasses.replace(recipe.video, optimizer=optimizer)\n"
        "workers = dataclasses.replace(recipe.workers, num_workers=2, cpus_per_worker=1, checkpoint_every=6,"
        " show_every=1000)\n"
        "train_video(video, workers, [store.Manifest.load(sys.argv[1])], sys.argv[2])\n"
    )
    marks = {VARIABLE: "sigterm_grace", ONCE: str(storage / "marks")}
    command = [sys.executable, "-c", script, latents.uri, str(storage), str(NUM_STEPS)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", **marks},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
