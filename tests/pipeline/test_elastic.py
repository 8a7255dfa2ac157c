"""A run of two workers loses a machine, goes on with one, takes another machine in, and has the same curve."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from runs import losses_of

from pipeline import store
from pipeline.plan import Plan
from pipeline.train_video import VideoTask
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import SingleProcess, TrainState

ROOT = Path(__file__).parents[2]
NUM_STEPS = 250
FIELDS = ("dit", "diffusion", "plan", "optimizer", "num_steps", "guidance_scale")


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
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "8"  # for the lost machine, before it goes on without
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = store.Manifest.load(ended.stdout.split()[-1])
    assert losses_of(run) == pytest.approx(plain_losses(recipe, latents), abs=1e-5)
    lines = Path(run.uri, "metrics", "train.jsonl").read_text().splitlines()
    sizes = [json.loads(line)["num_workers"] for line in lines]
    turns = [size for place, size in enumerate(sizes) if place == 0 or size != sizes[place - 1]]
    assert turns == [2, 1, 2]


def train_through_changes(latents_uri, storage):
    """In a cluster of this process's own: a machine of one CPU goes, and another comes."""
    import threading
    import time

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
        checkpoint_every=10,
        show_every=1000,
        resize_every_s=1.0,
    )
    arguments = (video_of(recipe), workers, [store.Manifest.load(latents_uri)], storage)

    def wait_for(size, num_steps):
        """Until so many steps were done by so many workers."""
        while True:
            time.sleep(0.2)
            files = list(Path(storage).glob("train_video/*/metrics/train.jsonl"))
            lines = files[0].read_text().split("\n")[:-1] if files else []
            found = [json.loads(line)["num_workers"] for line in lines]
            if found.count(size) >= num_steps and found[-1] == size:
                return

    thread = threading.Thread(target=train_video, args=arguments, daemon=True)
    thread.start()
    wait_for(2, 15)
    machines.remove_node(second, allow_graceful=False)
    wait_for(1, 15)
    machines.add_node(num_cpus=1)
    thread.join()
    sys.stdout.write(f"{train_video(*arguments).uri}\n")
    ray.shutdown()
    machines.shutdown()


if __name__ == "__main__":
    train_through_changes(*sys.argv[1:])
