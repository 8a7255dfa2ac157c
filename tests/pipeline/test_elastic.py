"""A run of two workers loses a machine, takes another in, is told that this one will go, and has the same curve."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from runs import losses_of, train_workers

from pipeline import store
from pipeline.plan import Plan
from pipeline.train_video import VideoTask
from video_dit.parallel.checkpoint import committed
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import SingleProcess, TrainState

ROOT = Path(__file__).parents[2]
NUM_STEPS = 300
EVERY = 10  # steps between checkpoints


def video_of(recipe):
    optimizer = dataclasses.replace(recipe.video.optimizer, num_steps=NUM_STEPS)
    return dataclasses.replace(recipe.video, optimizer=optimizer)


def plain_losses(recipe, latents):
    """Of the same steps in a loop, without Ray and without processes."""
    video = video_of(recipe)
    task = VideoTask(
        latents_uris=(latents.uri,),
        held_out_share=video.held_out_share,
        **{
            name: getattr(video, name)
            for name in ("dit", "diffusion", "plan", "optimizer", "num_steps", "guidance_scale")
        },
    )
    torch.manual_seed(task.plan.seed)
    trainee = task.build()
    state, losses = TrainState(trainee.model, task.optimizer, SingleProcess()), []
    for number, step in Plan(trainee.samples, task.plan).steps():
        if number == NUM_STEPS:
            return losses
        batches = [MicroBatch(inputs=trainee.load(number, pack), weight=1.0, sample_ids=()) for pack in step.packs]
        num_elements = sum(trainee.num_elements(number, pack) for pack in step.packs)
        losses.append(train_step(state, batches, trainee.loss_function, num_elements)["loss"])
    return None


def test_a_run_shrinks_and_grows_with_the_cluster(recipe, latents, tmp_path):
    command = [sys.executable, __file__, latents.uri, str(tmp_path)]
    with tempfile.TemporaryDirectory() as folder:  # of the cluster, or others would take it for theirs
        settings = {  # what Ray waits for by default is most of this test's time
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",
        }
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, **settings}
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    saved, uri = (tmp_path / "result").read_text().split()
    assert int(saved) % EVERY  # at once, not when the next one was due
    run = store.Manifest.load(uri)
    assert losses_of(run) == pytest.approx(plain_losses(recipe, latents), abs=1e-5)
    lines = Path(run.uri, "metrics", "train.jsonl").read_text().splitlines()
    sizes = [json.loads(line)["num_workers"] for line in lines]
    turns = [size for place, size in enumerate(sizes) if place == 0 or size != sizes[place - 1]]
    assert turns == [2, 1, 2, 1]


def train_through_changes(latents_uri, storage):
    """In a cluster of this process's own: a machine of one CPU goes, another comes, and is to go away as well."""
    import ray
    from ray.cluster_utils import Cluster

    from jobs.recipes import smoke_cpu
    from pipeline import cluster
    from pipeline.train_video import train_video

    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = machines.add_node(num_cpus=1)
    cluster.connect(address=machines.address)
    recipe = smoke_cpu()
    workers = dataclasses.replace(
        recipe.workers,
        num_workers=2,
        min_workers=1,
        cpus_per_worker=1,
        checkpoint_every=EVERY,
        keep_checkpoints=NUM_STEPS,
        show_every=1000,
        resize_every_s=1.0,
    )
    arguments = (video_of(recipe), workers, [store.Manifest.load(latents_uri)], storage)
    thread = threading.Thread(target=train_video, args=arguments, daemon=True)
    thread.start()
    wait_for_steps(storage, 15, of_size=2)
    machines.remove_node(second, allow_graceful=False)
    wait_for_steps(storage, 15, of_size=1)
    with paused():
        third = machines.add_node(num_cpus=1)
    wait_for_steps(storage, 30, of_size=2)
    with paused():
        announce_end_of(machines, third)
    saved = wait_for_checkpoint_out_of_turn(storage, thread)
    machines.remove_node(third, allow_graceful=False)
    thread.join()
    Path(storage, "result").write_text(f"{saved} {train_video(*arguments).uri}")
    ray.shutdown()
    machines.shutdown()


def wait_for_steps(storage, num_steps, of_size):
    """Until so many steps were done by so many workers, and they are at work."""
    while True:
        time.sleep(0.2)
        files = list(Path(storage).glob("train_video/*/metrics/train.jsonl"))
        lines = files[0].read_text().split("\n")[:-1] if files else []
        sizes = [json.loads(line)["num_workers"] for line in lines]
        if sizes.count(of_size) >= num_steps and sizes[-1] == of_size:
            return


def wait_for_checkpoint_out_of_turn(storage, thread):
    """The step of the first one that was not due."""
    (folder,) = Path(storage).glob("train_video/*/checkpoints")
    while not (steps := [found.step for found in committed(str(folder)) if found.step % EVERY]):
        assert thread.is_alive(), "the run ended without"
        time.sleep(0.2)
    return steps[0]


@contextlib.contextmanager
def paused():
    """The workers stand still, or their short steps would end before a busy machine gets anything else done."""
    workers = train_workers()
    for worker in workers:
        worker.suspend()
    yield
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()


def announce_end_of(machines, machine):
    """As a cloud does for a spot machine."""
    words = ["--address", machines.address, "--node-id", machine.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *words]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    train_through_changes(*sys.argv[1:])
