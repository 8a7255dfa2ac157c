"""Seconds a step through Ray Train against a bare loop of the same step under torchrun."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import ratio
from training_runs import NUM_STEPS, WARM_UP, Bench, rows_of

from pipeline.feed import prefetch
from pipeline.heap import keep_freed_memory
from pipeline.plan import Plan, packs_of_rank
from pipeline.train_video import VideoTask, VideoTrainee
from video_dit.diffusion.losses import diffusion_losses
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.world import DistributedWorld, group_of_torchrun
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import TrainState


def bare_loop(task: VideoTask, file: str) -> None:
    """The same steps without Ray; writes when each ended."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(task.plan.seed)
    with group_of_torchrun():
        trainee, world = task.build(), DistributedWorld("cpu")
        state = TrainState(parallelize(trainee.model, world.mesh, ParallelConfig()), task.optimizer, world)
        plan, ends = Plan(trainee.samples, task.plan), []
        for batch in prefetch(bare_batches(plan, trainee, world)):
            train_step(state, *batch.value)
            ends.append(time.time())
            if state.step == NUM_STEPS:
                break
        if world.rank == 0:
            Path(file).write_text(json.dumps(ends))


def bare_batches(plan: Plan, trainee: VideoTrainee, world: DistributedWorld) -> Iterator[tuple[Any, Any, float]]:
    """Arguments of `train_step` behind the state."""
    for number, step in plan.steps():
        own = [
            MicroBatch(inputs=trainee.load(number, pack), weight=weight, sample_ids=())
            for pack, weight in packs_of_rank(step, world.rank, world.size)
        ]
        yield own, diffusion_losses, sum(trainee.num_elements(number, pack) for pack in step.packs)


def step_seconds(ends: list[float]) -> float:
    """Median of the seconds between two steps."""
    counted = ends[WARM_UP:]
    return statistics.median(b - a for a, b in itertools.pairwise(counted))


def loop(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds a step of two workers, both ways."""
    times: dict[str, list[float]] = {"ray": [], "bare": []}
    whole: dict[str, list[float]] = {"ray": [], "bare": []}
    for number in range(rounds):
        for name in ("ray", "bare")[:: 1 if number % 2 else -1]:
            start_s = time.time()
            ends = _ray_ends(bench) if name == "ray" else _bare_ends(bench)
            times[name].append(step_seconds(ends))
            whole[name].append(ends[-1] - start_s)
            print(f"{name}: {1e3 * times[name][-1]:.1f} ms a step, {whole[name][-1]:.1f} s with start", flush=True)
    return {
        "step_ms": {name: [round(1e3 * value, 2) for value in values] for name, values in times.items()},
        "seconds_with_start": whole,
        "steps": NUM_STEPS,
        "ray_over_bare": ratio(times, "bare", "ray")._asdict(),
    }


def _ray_ends(bench: Bench) -> list[float]:
    storage = bench.new_folder()
    bench.train(NUM_STEPS, storage, num_workers=2)
    return [row["time_s"] for row in rows_of(storage)]


def _bare_ends(bench: Bench) -> list[float]:
    file, script = f"{bench.folder}/ends.json", str(Path(__file__).with_name("training.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, script, "--bare", bench.run, file], check=True, capture_output=True)
    ends: list[float] = json.loads(Path(file).read_text())
    return ends
