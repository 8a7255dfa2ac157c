"""What each worker of a training run does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
import torch
from ray.train.torch import get_device

from pipeline import progress, store
from pipeline.attempts import Attempts
from pipeline.errors import RejectReason
from pipeline.feed import Timed, pinned, prefetch
from pipeline.heap import keep_freed_memory
from pipeline.interruptions import Interruptions
from pipeline.plan import Pack, Plan, Step, packs_of_rank
from pipeline.run_card import CARD, card_of
from pipeline.run_log import RunLog
from pipeline.trainee import HasParts, Task, Trainee
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.checkpoint import Checkpoints
from video_dit.parallel.failpoints import reach
from video_dit.parallel.world import DistributedWorld
from video_dit.train_step import LossFunction, MicroBatch, train_step
from video_dit.training import TrainState

CHECKPOINTS, METRICS, STOP_FILE = "checkpoints", "metrics", "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What the driver tells the workers.

    Attributes:
        task: what to train.
        workers: fields of `pipeline.train.WorkersConfig`.
        folder: of the run.
        checkpoints: folder or URL.
        attempt: number of the driver's attempt.
        validator: actor that looks at exported models.
    """

    task: Task
    workers: dict[str, Any]
    folder: str
    checkpoints: str
    attempt: int
    validator: Any


class StepBatch(NamedTuple):
    """One rank's part of a step."""

    step: int
    micro_batches: list[MicroBatch]
    num_elements: float  # of the whole step
    num_tokens: int  # of the whole step
    num_samples: int  # of the whole step
    flops: float  # of the whole step; 0 where they are not counted


def train_worker(config: dict[str, WorkerConfig]) -> None:
    """Train to the last step, or until the run is stopped."""
    keep_freed_memory()
    Worker(config["config"]).run()


class Worker:
    """One process of a training run.

    Args:
        config: the driver's.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config, self.task, self.root = config, config.task, Path(config.folder)
        torch.manual_seed(self.task.plan.seed)  # equal initial weights on every rank
        self.trainee: Trainee = self.task.build()
        self.plan = Plan(self.trainee.samples, self.task.plan)
        device = get_device()
        self.world = _world(device.type, self.task.plan.context_size, config.workers["num_replicas"])
        parallel = ParallelConfig(
            context_size=self.world.mesh["context"].size(),
            precision=self.task.precision,
            **{name: config.workers[name] for name in ("context_form", "activation_checkpointing", "compile")},
        )
        model = parallelize(self.trainee.model.to(device), self.world.mesh, parallel)
        parts = self.task.part_optimizers if isinstance(self.task, HasParts) else None
        self.state = TrainState(model, self.task.optimizer, self.world, parts)
        check = functools.partial(Attempts(self.root).check, config.attempt)
        self.checkpoints = Checkpoints(config.checkpoints, self.world, config.workers["keep_checkpoints"], check)
        self.interruptions = Interruptions(self.root / STOP_FILE, self.world)
        self.may_write = check

    def run(self) -> None:
        """Train from the newest checkpoint on."""
        self.checkpoints.restore(self.state)
        log = None
        if self.world.rank == 0:
            self._write_rejects()
            log = RunLog(
                self.root, self.root / METRICS, self.state.step, self.world.size, self.config.workers["trackers"]
            )
            self._write_card(log.peak_flops)
        self.trainee.begin(self._own_places(self.state.step))
        batches = prefetch(self._batches(self.state.step))
        stall_s = 0.0  # of the checkpoint before this step
        while self.state.step < self.task.optimizer.num_steps:
            metrics = _train_on(self.state, next(batches), self.trainee.loss_function)
            if log:
                self.may_write()
                log.write(metrics, stall_s)
            with progress.Stopwatch() as watch:
                goes_on = self._go_on()
            stall_s = watch.elapsed_s
            if not goes_on:
                return
        self.checkpoints.wait()
        self._export()
        if log:
            log.close()

    def _go_on(self) -> bool:
        """After a step: save and show what is due; returns whether there is more to do."""
        step, workers, asked = self.state.step, self.config.workers, self.interruptions.look()
        is_last = step == self.task.optimizer.num_steps
        if step % workers["checkpoint_every"] == 0 or is_last or asked.save or asked.stop:
            self.checkpoints.save(self.state)  # not reported to Ray, which would have it in its own folder
            reach("after_save")
        if asked.save or asked.stop:
            reach("sigterm_grace")
            self.checkpoints.wait()
        if step % workers["show_every"] == 0 and not is_last and not asked.stop:
            self._export()
            if self.world.rank == 0:
                self.config.validator.look.remote(self._folder(), step)
        return not asked.stop

    def _batches(self, start: int) -> Iterator[StepBatch]:
        num_tokens = self.trainee.samples.num_tokens
        for number, step in self.plan.steps(start):
            if number >= self.task.optimizer.num_steps:
                return
            yield StepBatch(
                step=number,
                micro_batches=self._own_part(number, step),
                num_elements=sum(self.trainee.num_elements(number, pack) for pack in step.packs),
                num_tokens=int(sum(num_tokens[list(pack)].sum() for pack in step.packs)),
                num_samples=sum(len(pack) for pack in step.packs),
                flops=sum(self.trainee.flops(pack) for pack in step.packs),
            )

    def _own_places(self, start: int) -> Iterator[int]:
        """Samples that this rank loads, in order."""
        for number, step in self.plan.steps(start):
            if number >= self.task.optimizer.num_steps:
                return
            for pack, _ in self._own_packs(step):
                yield from pack

    def _own_packs(self, step: Step) -> list[tuple[Pack, float]]:
        """This rank's packs of a step with their weights, or those of its group."""
        size = self._sharers(step)
        return packs_of_rank(step, self.world.rank // size, self.world.size // size)

    def _own_part(self, number: int, step: Step) -> list[MicroBatch]:
        """This rank's packs of a step, or its runs of tokens in the packs of its group."""
        size, batches = self._sharers(step), []
        for pack, weight in self._own_packs(step):
            inputs = self.trainee.load(number, pack)
            inputs = inputs if size == 1 else inputs.shard(self.world.rank % size, size)
            inputs = pinned(inputs) if self.world.mesh.device_type == "cuda" else inputs
            batches.append(MicroBatch(inputs=inputs, weight=weight, sample_ids=self.trainee.sample_ids(pack)))
        return batches

    def _sharers(self, step: Step) -> int:
        """Processes that run each pack of a step together."""
        return self.world.mesh["context"].size() if step.is_shared else 1

    def _write_rejects(self) -> None:
        """What the plan leaves out, and why."""
        num_tokens, longest = self.trainee.samples.num_tokens, self.task.plan.longest
        rows = [
            {
                "what": self.trainee.sample_ids((place,))[0],
                "reason": str(RejectReason.TOO_LONG),
                "detail": f"{num_tokens[place]} tokens, but token_budget and context_size make packs of {longest}",
                "stage": "plan",
            }
            for place in self.plan.rejected
        ]
        counts = {"samples": len(num_tokens) - len(rows), "rejects": len(rows)}
        files = [store.write_shard(str(self.root), "rejects", rows)] if rows else []
        store.write_json(str(self.root / METRICS / "data.json"), {"counts": counts, "files": {"rejects": files}})

    def _write_card(self, peak: float) -> None:
        """For the driver, which shows it."""
        card = card_of(
            self.state,
            self.plan,
            self.trainee.flops,
            num_steps=self.task.optimizer.num_steps,
            checkpoint_every=self.config.workers["checkpoint_every"],
            peak=peak,
        )
        store.write_json(str(self.root / METRICS / CARD), dataclasses.asdict(card))

    def _export(self) -> None:
        averaged = self.world.gather_state(self.state.ema)
        if self.world.rank == 0:
            self.may_write()
            figures = self.trainee.export(self._folder(), averaged)
            store.write_json(str(self.root / METRICS / "result.json"), figures)
        self.world.barrier()

    def _folder(self) -> str:
        """Of the present step's model."""
        return str(self.root / "models" / f"step-{self.state.step}")


def _world(device_type: str, context_size: int, num_replicas: int) -> DistributedWorld:
    """The processes; where they are too few to share long packs, each runs them whole."""
    size = ray.train.get_context().get_world_size()
    return DistributedWorld(device_type, 1 if size % context_size else context_size, num_replicas)


def _train_on(state: TrainState, batch: Timed[StepBatch], loss: LossFunction) -> dict[str, float]:
    with progress.Stopwatch() as watch:
        metrics = train_step(state, batch.value.micro_batches, loss, batch.value.num_elements)
    return {
        "step": batch.value.step,
        **metrics,
        "num_tokens": batch.value.num_tokens,
        "num_samples": batch.value.num_samples,
        "flops": batch.value.flops,
        "step_s": watch.elapsed_s + batch.wait_s,
        "data_wait_s": batch.wait_s,
    }
