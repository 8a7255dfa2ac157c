"""A run of two workers loses a machine, goes on with one, takes another machine in, and has the same curve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import losses_of

from pipeline import store

ROOT = Path(__file__).parents[2]


def test_a_run_shrinks_and_grows_with_the_cluster(latents, tmp_path):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, __file__, latents.uri, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    elastic, steady = (store.Manifest.load(uri) for uri in ended.stdout.split()[-2:])
    assert losses_of(elastic) == pytest.approx(losses_of(steady), abs=1e-5)
    lines = Path(elastic.uri, "metrics", "train.jsonl").read_text().splitlines()
    sizes = [json.loads(line)["num_workers"] for line in lines]
    turns = [size for place, size in enumerate(sizes) if place == 0 or size != sizes[place - 1]]
    assert turns == [2, 1, 2]


def train_through_changes(latents_uri, storage):
    """In a cluster of this process's own: a machine of one CPU goes, and another comes."""
    import dataclasses
    import threading
    import time

    from ray.cluster_utils import Cluster

    from jobs.recipes import smoke_cpu
    from pipeline import cluster
    from pipeline.train_video import train_video

    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = machines.add_node(num_cpus=1)
    cluster.connect(address=machines.address)
    recipe, latents = smoke_cpu(), [store.Manifest.load(latents_uri)]
    optimizer = dataclasses.replace(recipe.video.optimizer, num_steps=400)
    video = dataclasses.replace(recipe.video, optimizer=optimizer)
    workers = dataclasses.replace(
        recipe.workers,
        num_workers=2,
        min_workers=1,
        cpus_per_worker=1,
        checkpoint_every=10,
        show_every=1000,
        resize_every_s=1.0,
    )

    def rows():
        (file,) = Path(storage, "elastic").glob("train_video/*/metrics/train.jsonl")
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]]

    def wait_for(size, num_steps):
        while True:
            time.sleep(0.2)
            try:
                found = [row["num_workers"] for row in rows()]
            except ValueError:
                continue
            if found.count(size) >= num_steps and found[-1] == size:
                return

    thread = threading.Thread(target=train_video, args=(video, workers, latents, f"{storage}/elastic"), daemon=True)
    thread.start()
    wait_for(2, 15)
    machines.remove_node(second, allow_graceful=False)
    wait_for(1, 15)
    machines.add_node(num_cpus=1)
    thread.join()
    elastic = train_video(video, workers, latents, f"{storage}/elastic")
    steady = train_video(video, dataclasses.replace(workers, min_workers=None), latents, f"{storage}/steady")
    sys.stdout.write(f"{elastic.uri} {steady.uri}\n")


if __name__ == "__main__":
    train_through_changes(*sys.argv[1:])
