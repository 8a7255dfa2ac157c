"""A training run on Ray Train: one loop for every model, FSDP2 under it, resumable from its folder alone.

A run's folder holds `run.json`, `attempts/`, `checkpoints/step-N/` (sharded), `models/step-N/` (averaged weights),
`metrics/` (train.jsonl and TensorBoard) and, when it is done, `manifest.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ray.train
from ray.train.torch import TorchTrainer

from pipeline import console, progress, store
from pipeline.attempts import Attempts
from pipeline.errors import TrainingDivergedError, TrainingStoppedError
from pipeline.trackers import TrackerName
from pipeline.train_worker import CHECKPOINTS, METRICS, STOP_FILE, WorkerConfig, train_worker
from pipeline.trainee import Task
from pipeline.validation import last_figures, start_validator, wait_for
from video_dit.parallel.activation_checkpointing import Checkpointing
from video_dit.parallel.checkpoint import committed
from video_dit.parallel.context import ContextForm
from video_dit.train_step import NotFiniteError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """What a run gets from the cluster and how it guards itself. None of it changes the result.

    Attributes:
        num_workers: processes that share each step.
        min_workers: go on with as few as this when there are no more, and take others in when they come (elastic);
            None waits for all.
        cpus_per_worker, gpus_per_worker: of each.
        num_replicas: copies of the model, each sharded over as many processes (HSDP); 1 shards over all.
        activation_checkpointing, compile, context_form: see `video_dit.parallel.apply.ParallelConfig`.
        checkpoint_every: steps between checkpoints, which are written while training goes on.
        checkpoints: folder or URL of the checkpoints, such as a bucket; None is the run's own folder.
        keep_checkpoints: how many are kept.
        show_every: steps between model folders, each measured and with videos to look at in TensorBoard; the last step
            has one too.
        validation_cpus, validation_gpus: of the process that measures and makes those videos while training goes on.
        trackers: services that get the metrics, too; those that fail are left alone.
        max_failures: how often a dead worker group is started again from the last checkpoint.
        preemption_grace_s: how long a machine that is to go away is waited for, to save a checkpoint.
        resize_every_s: how often an elastic run looks for more workers.
        resume: what to do with an earlier attempt's checkpoints: go on from them if there are any ("auto"), refuse
            to ("never"), or refuse to begin without ("must").
    """

    num_workers: int = 1
    min_workers: int | None = None
    cpus_per_worker: float = 2
    gpus_per_worker: float = 0
    num_replicas: int = 1
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False
    context_form: ContextForm = "auto"
    checkpoint_every: int = 200
    checkpoints: str | None = None
    keep_checkpoints: int = 2
    show_every: int = 1000
    validation_cpus: float = 0
    validation_gpus: float = 0
    trackers: tuple[TrackerName, ...] = ()
    max_failures: int = 3
    preemption_grace_s: float = 60.0
    resize_every_s: float = 60.0
    resume: Literal["auto", "never", "must"] = "auto"

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_replicas", "checkpoint_every", "show_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers}: must be from 1 to num_workers={self.num_workers}, or None"
            )
        if self.num_workers % self.num_replicas or (self.min_workers is not None and self.num_replicas > 1):
            raise ValueError(
                f"num_replicas={self.num_replicas}: must divide num_workers={self.num_workers}, be 1 with min_workers"
            )


def train(task: Task, workers: WorkersConfig, folder: str, label: str) -> store.Produced:
    """Train in `folder`, from its last checkpoint if it has one, to the last step.

    Args:
        task: what to train.
        workers: resources.
        folder: the run's folder, on a file system that all workers share.
        label: for the progress bar.

    Raises:
        ValueError: the folder is not on a shared file system, or `resume` does not fit what is there.
        RunBusyError: another process trains this run.
        TrainingDivergedError: a loss that is not finite; the message names step and samples.
        TrainingStoppedError: SIGTERM; there is a checkpoint of the step that was reached.
    """
    root = store.local_path(folder, "a training run")
    root.mkdir(parents=True, exist_ok=True)
    checkpoints = store.absolute(workers.checkpoints) if workers.checkpoints else str(root / CHECKPOINTS)
    _check_resume(workers, checkpoints, label)
    with Attempts(root).claim() as attempt:
        run = {"task": dataclasses.asdict(task), "workers": dataclasses.asdict(workers)}  # type: ignore[call-overload]
        store.write_json(f"{folder}/run.json", run)
        worker = WorkerConfig(
            task=task,
            workers=dataclasses.asdict(workers),
            folder=str(root),
            checkpoints=checkpoints,
            attempt=attempt,
            validator=start_validator(task, root / METRICS, workers.validation_cpus, workers.validation_gpus),
        )
        trainer = _trainer(workers, worker, root / "ray_train", f"{root.name}-attempt-{attempt}")
        watching = progress.watch(root / METRICS, task.optimizer.num_steps, label)
        with watching, _stop_on_sigterm(root / STOP_FILE):
            _fit(trainer)
            if (root / STOP_FILE).exists():
                raise TrainingStoppedError(f"{folder}: stopped, with a checkpoint; the same command goes on from there")
    num_steps = task.optimizer.num_steps
    wait_for(worker.validator.look.remote(str(root / "models" / f"step-{num_steps}"), num_steps))
    result, data = (json.loads((root / METRICS / f"{name}.json").read_text()) for name in ("result", "data"))
    return store.Produced(
        counts={"step": num_steps, **data["counts"]},
        files=data["files"],
        measures={**result, **last_figures(root / METRICS, num_steps)},
    )


def _check_resume(workers: WorkersConfig, checkpoints: str, label: str) -> None:
    newest = next(iter(committed(checkpoints)), None)
    if newest is None:
        if workers.resume == "must":
            raise ValueError(f"resume='must': {checkpoints} holds no checkpoint; use 'auto' to begin a run")
        return
    if workers.resume == "never":
        raise ValueError(
            f"resume='never': {checkpoints} has a checkpoint of step {newest.step}; use 'auto' or delete it"
        )
    console.say(f"{label}: goes on from step {newest.step} of {checkpoints}")


def _trainer(workers: WorkersConfig, worker: WorkerConfig, storage: Path, name: str) -> TorchTrainer:
    smallest = workers.min_workers
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": worker},
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # the types are those of Train's version 1
            num_workers=workers.num_workers if smallest is None else (smallest, workers.num_workers),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=workers.resize_every_s,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker={"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            worker_runtime_env={"env_vars": {k: v for k, v in os.environ.items() if k.startswith("KINORAY_")}},
            name=name,  # of its own: Ray resumes a known name by itself, but this run's checkpoints decide
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=workers.max_failures, preemption_grace_s=workers.preemption_grace_s
            ),
        ),
    )


def _fit(trainer: TorchTrainer) -> None:
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:  # tells of the worker's exception in words only
        diverged = re.search(rf"{NotFiniteError.__name__}: (step .*)", str(error))
        if diverged:
            raise TrainingDivergedError(diverged[1]) from error
        raise


@contextlib.contextmanager
def _stop_on_sigterm(file: Path) -> Iterator[None]:
    """While inside, SIGTERM asks the workers to save a checkpoint and return; a second one ends the process."""
    file.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: object) -> None:
        file.touch()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
