"""What a training run trains: the part that differs between models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pipeline import media
from pipeline.mixture import Samples
from pipeline.plan import Pack, PlanConfig
from video_dit.parallel.apply import Precision
from video_dit.train_step import LossFunction
from video_dit.training import OptimizerConfig


class Trainee(Protocol):
    """A model with its data, inside a worker."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def loss_function(self) -> LossFunction:
        """(model, inputs) -> loss summed over elements, or several by name."""

    @property
    def samples(self) -> Samples:
        """What there is to train on; packs are of places in it."""

    def begin(self, places: Iterator[int]) -> None:
        """Told once, before `load`: the samples that it will be asked for, in order."""

    def num_elements(self, step: int, pack: Pack) -> float:
        """How many elements the loss of a pack is summed over in a step."""

    def sample_ids(self, pack: Pack) -> tuple[str, ...]:
        """Names of a pack's samples."""

    def load(self, step: int, pack: Pack) -> Any:
        """The loss function's inputs for a pack; a function of its arguments alone."""

    def export(self, folder: str, averaged: dict[str, Tensor]) -> dict[str, float]:
        """Write a model folder from averaged weights; returns figures worth reporting. On one process only."""

    def flops(self, pack: Pack) -> float:
        """Model operations of a training step's pack; 0 where nobody counted them."""

    def measure(self, folder: str) -> dict[str, float]:
        """Figures of an exported folder, on what it was not trained on."""

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

    @property
    def precision(self) -> Precision:
        """Of weights and activations in the blocks."""

    def build(self) -> Trainee:
        """Open the data and make the model; the same on every worker."""


@runtime_checkable
class HasParts(Protocol):
    """A task whose model has submodules with optimizers of their own, such as a discriminator."""

    @property
    def part_optimizers(self) -> Mapping[str, OptimizerConfig]:
        """By the submodule's name."""
