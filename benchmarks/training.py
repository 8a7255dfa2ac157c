"""What training costs beside the step itself: Ray Train, checkpoints, padding, kills.

    python benchmarks/training.py --run runs/train_video/<run of make demo>
        [--parts loop packing checkpoints workers goodput] [--minutes 15 --kill-every 60]

A run's transformer, on its LATENTS, on a CPU.
loop: seconds a step through Ray Train against a bare loop of the same step under torchrun, both with prefetching, in
turns; with start-up stated beside it.
packing: tokens a second of packed steps against batches padded to their largest clip, with the padding masked as keys,
and without (which trains on padding), forward and backward, in turns.
checkpoints: the share of a run that stood still for checkpoints, and that a run with them takes longer.
workers: tokens a second of 1, 2 and 4 workers (of as many cores as there are).
goodput: SIGKILL of a worker every so many seconds; the share of the time that went into steps that counted, and where
the rest went.
Writes results/training.json and the README's table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from einops import rearrange
from measure import RESULTS, Ratio, interleave, ratio, write_result, write_table
from torch.nn.functional import scaled_dot_product_attention

from pipeline import store
from pipeline.feed import prefetch
from pipeline.heap import keep_freed_memory
from pipeline.models import open_model
from pipeline.plan import Plan, PlanConfig, packs_of_rank
from pipeline.train import WorkersConfig
from pipeline.train_video import TrainVideoConfig, VideoTask, VideoTrainee, latents_of, train_video
from video_dit import weights
from video_dit.attention import attend
from video_dit.diffusion.losses import DiffusionConfig, diffusion_batch, diffusion_losses
from video_dit.model import VideoDiTConfig
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.world import DistributedWorld, group_of_torchrun
from video_dit.random import keyed_normal
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import OptimizerConfig, TrainState

NUM_STEPS = 120
WARM_UP = 20  # steps that do not count
NEVER = 10**9


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a finished run of train_video")
    parser.add_argument("--parts", nargs="+", default=["loop", "packing", "checkpoints", "workers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15, help="of goodput")
    parser.add_argument("--kill-every", type=float, default=60, help="seconds, of goodput")
    parser.add_argument("--bare", nargs=2, metavar=("RUN", "FILE"), help="only the bare loop, under torchrun")
    options = parser.parse_args()
    if options.bare:
        run, file = options.bare
        bare_loop(task_of(run), file)
        return
    if not options.run:
        parser.error("--run: give the folder of a finished run")
    from pipeline import cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster.connect(num_cpus=4, address="local", include_dashboard=False)
    file = RESULTS / "training.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.run, folder)
        parts: dict[str, Callable[[], Any]] = {
            "loop": lambda: loop(bench, options.rounds),
            "packing": lambda: packing(bench),
            "checkpoints": lambda: checkpoints(bench, options.rounds),
            "workers": lambda: workers(bench),
        }
        for name in options.parts:
            if name == "goodput":
                found = goodput(bench, options.minutes * 60, options.kill_every)
                figures["goodput"] = {**figures.get("goodput", {}), f"{options.kill_every:g}": found}
            else:
                figures[name] = parts[name]()
            print(json.dumps(figures[name], indent=2), flush=True)
            write_result("training", figures)
    write_table("training table", table(json.loads(file.read_text())))


class Bench:
    """Runs like a finished one, of other lengths."""

    def __init__(self, run: str, folder: str) -> None:
        self.run, self.folder, self.task = run, folder, task_of(run)
        self.latents = [store.Manifest.load(uri) for uri in self.task.latents_uris]
        self._num_runs = itertools.count()

    def config(self, num_steps: int) -> TrainVideoConfig:
        """The run's, of another length."""
        fields = {
            name: getattr(self.task, name) for name in ("dit", "diffusion", "plan", "num_steps", "guidance_scale")
        }
        optimizer = dataclasses.replace(self.task.optimizer, num_steps=num_steps)
        return TrainVideoConfig(optimizer=optimizer, num_validation_prompts=0, **fields)

    def train(self, num_steps: int, storage: str | None = None, **workers: Any) -> store.Manifest:
        """A run of its own."""
        settings = {"cpus_per_worker": 1, "checkpoint_every": NEVER, "show_every": NEVER, **workers}
        storage = storage or self.new_folder()
        return train_video(self.config(num_steps), WorkersConfig(**settings), self.latents, storage)

    def new_folder(self) -> str:
        """For a run."""
        return f"{self.folder}/run{next(self._num_runs)}"


def task_of(run: str) -> VideoTask:
    """What a finished run trained, for NUM_STEPS."""
    model = open_model(run)
    assert model.run is not None
    config = model.run.config
    return VideoTask(
        latents_uris=tuple(manifest.uri for manifest in latents_of(model)),
        dit=weights.read_config(VideoDiTConfig, model.uri, "transformer"),
        diffusion=DiffusionConfig(**config["diffusion"]),
        plan=PlanConfig(**{**config["plan"], "stages": ()}),
        optimizer=OptimizerConfig(**{**config["optimizer"], "num_steps": NUM_STEPS}),
        num_steps=config["num_steps"],
        guidance_scale=config["guidance_scale"],
        held_out_share=config["held_out_share"],
    )


# --- Ray Train against a bare loop ----------------------------------------------------------------------------------


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


def rows_of(storage: str) -> list[dict[str, float]]:
    """What a run logged so far."""
    (file,) = Path(storage).glob("train_video/*/metrics/train.jsonl")
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


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
    file = f"{bench.folder}/ends.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    subprocess.run([*command, "--bare", bench.run, file], check=True, capture_output=True)
    ends: list[float] = json.loads(Path(file).read_text())
    return ends


# --- packed against padded ------------------------------------------------------------------------------------------


def packing(bench: Bench, num_packs: int = 24) -> dict[str, Any]:
    """Tokens a second of real clips, in packs and in batches padded to the largest clip of the same packs."""
    torch.set_num_threads(2)
    task, trainee = bench.task, bench.task.build()
    packs = [pack for step in Plan(trainee.samples, task.plan).epoch(0) for pack in step.packs][:num_packs]
    packed, padded = ([_batch(trainee, pack, shape_of) for pack in packs] for shape_of in (None, _largest))
    masks = [_mask(trainee, pack) for pack in packs]
    candidates = {
        "packed": lambda: _run_all(trainee, packed),
        "padded": lambda: _run_all(trainee, padded, masks),
        "padded, no mask": lambda: _run_all(trainee, padded),
    }
    useful = sum(int(trainee.samples.num_tokens[list(pack)].sum()) for pack in packs)
    num_padded = sum(len(pack) * _grid_tokens(trainee, pack) for pack in packs)
    times = interleave(candidates, rounds=5)
    return {
        "packed_over_padded": ratio(times, "packed", "padded")._asdict(),
        "packed_over_padded_without_mask": ratio(times, "packed", "padded, no mask")._asdict(),
        "tokens_per_s": {name: useful / statistics.median(values) for name, values in times.items()},
        "padding": num_padded / useful,
    }


def _largest(trainee: VideoTrainee, pack: tuple[int, ...]) -> tuple[int, int, int]:
    shapes = [trainee.data.shapes[place] for place in pack]
    return max(s.t for s in shapes), max(s.h for s in shapes), max(s.w for s in shapes)


def _grid_tokens(trainee: VideoTrainee, pack: tuple[int, ...]) -> int:
    t, h, w = _largest(trainee, pack)
    patch = trainee.task.dit.patch
    return (t // patch.t) * (h // patch.h) * (w // patch.w)


def _batch(trainee: VideoTrainee, pack: tuple[int, ...], shape_of: Callable[..., Any] | None) -> Any:
    if shape_of is None:
        return trainee.load(0, pack)
    shape = (trainee.task.dit.in_channels, *shape_of(trainee, pack))
    samples = [trainee.data[place] for place in pack]
    length = max(len(sample.text) for sample in samples)
    return diffusion_batch(
        latents=[keyed_normal(shape, sample.clip_id) for sample in samples],
        texts=[keyed_normal((length, sample.text.shape[1]), sample.clip_id) for sample in samples],
        empty_text=keyed_normal((length, samples[0].text.shape[1]), 0),
        keys=[(0, sample.clip_id) for sample in samples],
        config=trainee.task.diffusion,
        patch=trainee.task.dit.patch,
    )


def _mask(trainee: VideoTrainee, pack: tuple[int, ...]) -> torch.Tensor:
    """b n, of the padded batch: which tokens are of the clips."""
    patch, largest = trainee.task.dit.patch, _largest(trainee, pack)
    mask = torch.zeros(len(pack), *(side // step for side, step in zip(largest, patch, strict=True)), dtype=torch.bool)
    for number, place in enumerate(pack):
        t, h, w = trainee.data.shapes[place].grid(patch)
        mask[number, :t, :h, :w] = True
    return mask.flatten(1)


def _masked(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: object) -> torch.Tensor:
    """Stands for `attend` of a batch of equal samples, whose padding is no key: n heads e each."""
    del segments
    q, k, v = (rearrange(x, "(b n) heads e -> b heads n e", b=len(mask)) for x in (q, k, v))
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return rearrange(y, "b heads n e -> (b n) heads e")


def _run_all(trainee: VideoTrainee, batches: list[Any], masks: list[torch.Tensor] | None = None) -> None:
    for number, batch in enumerate(batches):
        for block in trainee.model.blocks:
            block.self_attention.attend = attend if masks is None else functools.partial(_masked, masks[number])
        trainee.model.zero_grad()
        diffusion_losses(trainee.model, batch).trained["loss"].backward()


# --- checkpoints, workers, kills ------------------------------------------------------------------------------------


def checkpoints(bench: Bench, rounds: int, every: int = 50, num_steps: int = 200) -> dict[str, Any]:
    """The share of a run's time that it stood still to save, and how much longer it took than without."""
    shares, times = [], {"with": [], "without": []}
    for number in range(rounds):
        for name, interval in (("with", every), ("without", NEVER))[:: 1 if number % 2 else -1]:
            storage = bench.new_folder()
            bench.train(num_steps, storage, num_workers=2, checkpoint_every=interval)
            rows = rows_of(storage)[WARM_UP:]
            elapsed_s = rows[-1]["time_s"] - rows[0]["time_s"]
            times[name].append(elapsed_s)
            if name == "with":
                shares.append(sum(row["checkpoint_stall_s"] for row in rows[1:]) / elapsed_s)
    return {
        "every": every,
        "stall_share": {"median": statistics.median(shares), "all": shares},
        "with_over_without": ratio(times, "without", "with")._asdict(),
    }


def workers(bench: Bench) -> dict[str, float]:
    """Tokens a second by number of workers."""
    found = {}
    for size in (1, 2, 4):
        storage = bench.new_folder()
        bench.train(NUM_STEPS, storage, num_workers=size)
        rows = rows_of(storage)[WARM_UP:]
        found[str(size)] = sum(row["num_tokens"] for row in rows[1:]) / (rows[-1]["time_s"] - rows[0]["time_s"])
    return found


def goodput(bench: Bench, seconds: float, kill_every_s: float, checkpoint_every: int = 10) -> dict[str, Any]:
    """The share of the time that went into steps that counted, under kills."""
    storage, chance, kills = bench.new_folder(), random.Random(0), []
    start_s = time.time()
    thread = threading.Thread(
        target=lambda: bench.train(
            NEVER, storage, num_workers=2, checkpoint_every=checkpoint_every, max_failures=NEVER
        ),
        daemon=True,
    )
    thread.start()
    watch = Watch(storage)
    while time.time() - start_s < seconds:
        time.sleep(0.1)
        watch.look()
        if watch.began_s and time.time() - max([watch.began_s, *kills]) > kill_every_s:
            victims = train_workers()
            if victims:
                chance.choice(victims).kill()
                kills.append(time.time())
    watch.look()
    return {**watch.split(start_s, kills), "kills": len(kills), "minutes": seconds / 60}


class Watch:
    """Follows a run's log through its restarts."""

    def __init__(self, storage: str) -> None:
        self._storage = storage
        self.seen: dict[tuple[int, float], dict[str, float]] = {}  # every time that a step was done
        self.began_s = 0.0

    def look(self) -> None:
        """Read what is new."""
        with contextlib.suppress(ValueError, FileNotFoundError):
            for row in rows_of(self._storage)[-400:]:
                self.seen[int(row["step"]), row["time_s"]] = row
        if self.seen and not self.began_s:
            self.began_s = min(time_s for _, time_s in self.seen)

    def split(self, start_s: float, kills: list[float]) -> dict[str, Any]:
        """Seconds by what they were spent on, from the start to the last step."""
        rows = sorted(self.seen.values(), key=lambda row: row["time_s"])
        end_s, step_s = rows[-1]["time_s"], statistics.median(row["step_s"] for row in rows)
        last = {int(row["step"]): row for row in rows}  # the time that counted
        elapsed_s = end_s - start_s
        good_s = sum(row["step_s"] - row["data_wait_s"] for row in last.values())
        lost = [row for row in rows if last[int(row["step"])] is not row]
        restarts = []
        for kill_s in kills:
            before = max((row["time_s"] for row in rows if row["time_s"] <= kill_s), default=kill_s)
            after = min((row["time_s"] for row in rows if row["time_s"] > kill_s + 1), default=None)
            if after is not None:
                restarts.append(after - before - step_s)
        seconds = {
            "productive": good_s,
            "start": rows[0]["time_s"] - start_s,
            "restarts": sum(restarts),
            "steps done again": sum(row["step_s"] for row in lost),
            "data wait": sum(row["data_wait_s"] for row in last.values()),
            "checkpoint stall": sum(row["checkpoint_stall_s"] for row in last.values()),
        }
        seconds["other"] = elapsed_s - sum(seconds.values())
        since_first_s = end_s - rows[0]["time_s"]
        return {
            "goodput": good_s / since_first_s,
            "goodput_with_start": good_s / elapsed_s,
            "restart_s": statistics.median(restarts) if restarts else None,
            "steps": len(last),
            "share": {name: value / elapsed_s for name, value in seconds.items()},
        }


def train_workers() -> list[psutil.Process]:
    """The worker processes of this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def table(figures: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| training | |", "| --- | ---: |"]
    if "loop" in figures:
        lines.append(
            f"| a step through Ray Train over one of a bare loop | {Ratio(**figures['loop']['ray_over_bare'])} |"
        )
    if "packing" in figures:
        found = Ratio(**figures["packing"]["packed_over_padded"])
        lines.append(f"| tokens a second, packed over padded to the largest clip of a batch, and masked | {found} |")
    if "checkpoints" in figures:
        found = figures["checkpoints"]
        share = f"{100 * found['stall_share']['median']:.2f} %"
        lines.append(f"| share of a run that waits for checkpoints, one every {found['every']} steps | {share} |")
    for size, rate in figures.get("workers", {}).items():
        lines.append(f"| tokens a second, {size} worker{'s' * (size != '1')} | {rate:,.0f} |")
    for every, found in figures.get("goodput", {}).items():
        text = f"{100 * found['goodput']:.1f} % (restart {found['restart_s']:.1f} s)"
        lines.append(f"| share of the time in steps that count, a worker killed every {every} s | {text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
