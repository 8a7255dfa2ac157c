"""Distil a trained transformer into one that needs a few steps and no guidance; the result is a whole model folder."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

from torch import Tensor

from pipeline import store
from pipeline.latent_training import LatentTask, LatentTrainee, latents_of
from pipeline.models import Model
from pipeline.plan import Pack, PlanConfig
from pipeline.train import WorkersConfig, train
from video_dit import weights
from video_dit.diffusion.distillation import (
    AdversarialDistillation,
    DistillationBatch,
    DistillationConfig,
    distillation_batch,
    distillation_losses,
)
from video_dit.diffusion.losses import DiffusionConfig
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.training import OptimizerConfig

STUDENT = "student."  # in names of weights
STUDENT_GUIDANCE = 1.0  # the teacher's is distilled into it


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillVideoConfig:
    """A distillation run.

    Attributes:
        distillation: the student's steps and its losses.
        plan: token budget and batch, as in training; a step takes about three times the memory.
        optimizer: of the student.
        heads_learning_rate: of the discriminator's heads; all else is as for the student, but never Muon.
    """

    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    heads_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.heads_learning_rate <= 0:
            raise ValueError(f"heads_learning_rate={self.heads_learning_rate}: must be positive")


def distill_video(
    config: DistillVideoConfig, workers: WorkersConfig, teacher: Model, storage: str, name: str = "student"
) -> store.Manifest:
    """Distil, or return the run that the same call finished before.

    Args:
        config: decides the result.
        workers: resources; do not.
        teacher: the model of a finished run of `train_video`, which names its latents, schedule and target.
        storage: root of all results; a file system that all workers share.
        name: of the run.

    Raises:
        ManifestError: a teacher that is not such a run's.
        ValueError: a config that does not fit the teacher, or workers that cannot share the storage.
    """
    latents, run = latents_of(teacher), teacher.run
    assert run is not None  # it has latents
    dit: VideoDiTConfig = weights.read_config(VideoDiTConfig, teacher.uri, "transformer")
    config.distillation.blocks_of(dit.num_layers)
    task = DistillTask(
        latents_uris=tuple(manifest.uri for manifest in latents),
        dit=dit,
        diffusion=DiffusionConfig(**run.config["diffusion"]),
        plan=config.plan,
        optimizer=config.optimizer,
        num_steps=config.distillation.num_steps,
        guidance_scale=STUDENT_GUIDANCE,
        teacher_uri=teacher.uri,
        distillation=config.distillation,
        heads_learning_rate=config.heads_learning_rate,
    )
    return store.publish_once(
        storage,
        "distill_video",
        name,
        {**dataclasses.asdict(config), "teacher": teacher.uri.removeprefix(run.uri)},
        [run],
        lambda folder: train(task, workers, folder, "distillation"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTask(LatentTask):
    """See `pipeline.trainee.Task`."""

    teacher_uri: str
    distillation: DistillationConfig
    heads_learning_rate: float

    @property
    def part_optimizers(self) -> Mapping[str, OptimizerConfig]:
        """That of the discriminator's heads."""
        heads = dataclasses.replace(
            self.optimizer, learning_rate=self.heads_learning_rate, matrix_learning_rate=None, weight_decay=0.0
        )
        return {"heads": heads}

    def build(self) -> DistillTrainee:
        """Open the latents and load the teacher."""
        return DistillTrainee(self)


class DistillTrainee(LatentTrainee):
    """See `pipeline.trainee.Trainee`."""

    def __init__(self, task: DistillTask) -> None:
        super().__init__(task)
        self.distillation = task.distillation
        teacher = VideoDiT.from_pretrained(task.teacher_uri)
        self.model = AdversarialDistillation(copy.deepcopy(teacher), teacher, task.distillation, task.diffusion)
        self.loss_function = distillation_losses

    def load(self, step: int, pack: Pack) -> DistillationBatch:
        """Noised latents; noise and levels are keyed by (seed, step, clip)."""
        return distillation_batch(
            **self.batch_of(step, pack),
            config=self.distillation,
            schedule=self.task.diffusion.schedule,
            patch=self.task.dit.patch,
        )

    def flops(self, pack: Pack) -> float:
        """Not counted: teacher, student and heads."""
        return 0.0

    def export(self, folder: str, averaged: dict[str, Tensor]) -> dict[str, float]:
        """The student's model folder, which tells how it is meant to be sampled."""
        student = {name.removeprefix(STUDENT): value for name, value in averaged.items() if name.startswith(STUDENT)}
        return super().export(folder, student)
