"""A training run on Ray Train: one loop for every model, FSDP2 under it, resumable from its folder alone.

A run's folder holds `run.json`, `checkpoints/step-N/` (sharded), `models/step-N/` (averaged weights),
`metrics/` (train.jsonl and TensorBoard) and, when it is done, `manifest.json`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device
from torch import Tensor, nn

from pipeline import media, progress, store
from pipeline.errors import TrainingDivergedError
from pipeline.feed import Timed, prefetch
from pipeline.metrics_log import MetricsLog, log_videos
from pipeline.plan import Pack, PlanConfig, iterate_steps, packs_of_rank
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from video_dit.parallel.world import DistributedWorld
from video_dit.train_step import LossFunction, MicroBatch, NotFiniteError, train_step
from video_dit.training import OptimizerConfig, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """What a run gets from the cluster and how it guards itself. None of it changes the result.

    Attributes:
        num_workers: processes that share each step.
        cpus_per_worker, gpus_per_worker: of each.
        checkpoint_every: steps between checkpoints.
        show_every: steps between model folders, each with videos to look at in TensorBoard; the last step has one too.
        keep_checkpoints: how many are kept.
        max_failures: how often a dead worker group is started again from the last checkpoint.
    """

    num_workers: int = 1
    cpus_per_worker: float = 2
    gpus_per_worker: float = 0
    checkpoint_every: int = 200
    show_every: int = 1000
    keep_checkpoints: int = 2
    max_failures: int = 3

    def __post_init__(self) -> None:
        for name in ("num_workers", "checkpoint_every", "show_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


class Trainee(Protocol):
    """A model with its data, inside a worker."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def loss_function(self) -> LossFunction:
        """(model, inputs) -> loss summed over elements, or several by name."""

    @property
    def sizes(self) -> list[int]:
        """Of each sample, in the plan's tokens."""

    def num_elements(self, step: int, pack: Pack) -> float:
        """How many elements the loss of a pack is summed over in a step."""

    def sample_ids(self, pack: Pack) -> tuple[str, ...]:
        """Names of a pack's samples."""

    def load(self, step: int, pack: Pack) -> Any:
        """The loss function's inputs for a pack; a function of its arguments alone."""

    def export(self, folder: str, averaged: dict[str, Tensor]) -> dict[str, float]:
        """Write a model folder from averaged weights; returns figures worth reporting. On one process only."""

    def show(self, folder: str) -> tuple[dict[str, media.Frames], float]:
        """Videos to look at, t h w 3 by tag, made with an exported folder, and their frames per second."""


class Task(Protocol):
    """What to train; small and picklable, it travels to the workers."""

    @property
    def plan(self) -> PlanConfig:
        """Batches."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Learning rate and length."""

    def build(self) -> Trainee:
        """Open the data and make the model; the same on every worker."""


@runtime_checkable
class HasParts(Protocol):
    """A task whose model has submodules with optimizers of their own, such as a discriminator."""

    @property
    def part_optimizers(self) -> Mapping[str, OptimizerConfig]:
        """By the submodule's name."""


class StepBatch(NamedTuple):
    """One rank's part of a step."""

    step: int
    micro_batches: list[MicroBatch]
    num_elements: float  # of the whole step
    num_tokens: int  # of the whole step
    num_samples: int  # of the whole step


def train(task: Task, workers: WorkersConfig, folder: str, label: str) -> store.Produced:
    """Train in `folder`, from its last checkpoint if it has one, to the last step.

    Args:
        task: what to train.
        workers: resources.
        folder: the run's folder, on a file system that all workers share.
        label: for the progress bar.

    Raises:
        ValueError: the folder is not on a shared file system.
        TrainingDivergedError: a loss that is not finite; the message names step and samples.
    """
    root = store.local_path(folder, "a training run")
    root.mkdir(parents=True, exist_ok=True)
    store.write_json(f"{folder}/run.json", {"task": dataclasses.asdict(task), "workers": dataclasses.asdict(workers)})  # type: ignore[call-overload]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task, "workers": workers, "folder": str(root)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker={"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            # A name of its own: Ray resumes a known name by itself, but this run's checkpoints decide.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(root / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
        ),
    )
    with progress.watch(root / "metrics" / "train.jsonl", task.optimizer.num_steps, label):
        _fit(trainer)
    result = json.loads((root / "metrics" / "result.json").read_text())
    return store.Produced(counts={"step": task.optimizer.num_steps}, measures=result)


def _fit(trainer: TorchTrainer) -> None:
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:  # tells of the worker's exception in words only
        diverged = re.search(rf"{NotFiniteError.__name__}: (step .*)", str(error))
        if diverged:
            raise TrainingDivergedError(diverged[1]) from error
        raise


def model_folder(run: store.Manifest) -> str:
    """The model folder that a finished run ends with."""
    return store.join(run.uri, "models", f"step-{run.counts['step']}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model to sample from.

    Attributes:
        uri: its folder.
        run: the training run it came from; None for a folder from elsewhere.
    """

    uri: str
    run: store.Manifest | None

    @property
    def name(self) -> str:
        """The run's folder, or the model's own."""
        return (self.run.uri if self.run else self.uri).rsplit("/", 1)[-1]

    @property
    def parents(self) -> list[store.Manifest]:
        """For the lineage of what is made with it."""
        return [self.run] if self.run else []


def open_model(url: str) -> Model:
    """A model by the folder of its run, or by its own folder.

    Raises:
        ManifestError: neither is there.
    """
    uri = store.absolute(url).rstrip("/")
    if not store.exists(store.join(uri, "model_index.json")):
        run = store.Manifest.load(uri)
        return Model(uri=model_folder(run), run=run)
    folder = uri.rsplit("/", 2)[0]  # <run>/models/step-N
    return Model(uri=uri, run=store.Manifest.load(folder) if store.exists(f"{folder}/{store.MANIFEST}") else None)


def train_worker(config: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    task: Task = config["task"]
    workers: WorkersConfig = config["workers"]
    root = Path(config["folder"])
    torch.manual_seed(task.plan.seed)  # equal initial weights on every rank
    trainee = task.build()
    device = get_device()
    world = DistributedWorld(device.type)
    model = parallelize(trainee.model.to(device), world.mesh, ParallelConfig())
    state = TrainState(model, task.optimizer, world, task.part_optimizers if isinstance(task, HasParts) else None)
    latest = latest_checkpoint(root / "checkpoints")
    if latest:
        load_checkpoint(latest, state)
    log = MetricsLog(root / "metrics", start_step=state.step) if world.rank == 0 else None
    batches = prefetch(_batches(task, trainee, world, state.step))
    while state.step < task.optimizer.num_steps:
        metrics = _train_on(state, next(batches), trainee.loss_function)
        if log:
            log.write(metrics)
        is_last = state.step == task.optimizer.num_steps
        if state.step % workers.checkpoint_every == 0 or is_last:
            _checkpoint(state, world, root, workers, metrics)
        if state.step % workers.show_every == 0 and not is_last:
            _export(state, world, root, trainee)
    _export(state, world, root, trainee)


def _train_on(state: TrainState, batch: Timed[StepBatch], loss: LossFunction) -> dict[str, float]:
    with progress.Stopwatch() as watch:
        metrics = train_step(state, batch.value.micro_batches, loss, batch.value.num_elements)
    return {
        "step": batch.value.step,
        **metrics,
        "num_tokens": batch.value.num_tokens,
        "num_samples": batch.value.num_samples,
        "step_s": watch.elapsed_s + batch.wait_s,
        "data_wait_s": batch.wait_s,
    }


def _batches(task: Task, trainee: Trainee, world: DistributedWorld, start: int) -> Iterator[StepBatch]:
    for step, packs in iterate_steps(trainee.sizes, task.plan, start):
        yield StepBatch(
            step=step,
            micro_batches=[
                MicroBatch(inputs=trainee.load(step, pack), weight=weight, sample_ids=trainee.sample_ids(pack))
                for pack, weight in packs_of_rank(packs, world.rank, world.size)
            ],
            num_elements=sum(trainee.num_elements(step, pack) for pack in packs),
            num_tokens=sum(trainee.sizes[place] for pack in packs for place in pack),
            num_samples=sum(len(pack) for pack in packs),
        )


def _checkpoint(
    state: TrainState, world: DistributedWorld, root: Path, workers: WorkersConfig, metrics: dict[str, float]
) -> None:
    save_checkpoint(root / "checkpoints", state, world)
    if world.rank == 0:
        prune_checkpoints(root / "checkpoints", workers.keep_checkpoints)
    ray.train.report(metrics)  # no checkpoint: Ray wants them in its own folder, the run's are found without it


def _export(state: TrainState, world: DistributedWorld, root: Path, trainee: Trainee) -> None:
    averaged = world.gather_state(state.ema)
    if world.rank == 0:
        folder = str(root / "models" / f"step-{state.step}")
        figures = trainee.export(folder, averaged)
        store.write_json(str(root / "metrics" / "result.json"), figures)
        videos, fps = trainee.show(folder)
        log_videos(root / "metrics", state.step, videos, fps)
    world.barrier()
