"""Runs like a finished one, of other lengths: what the training benchmarks share."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.latent_training import latents_of
from pipeline.models import open_model
from pipeline.plan import PlanConfig
from pipeline.train import WorkersConfig
from pipeline.train_video import TrainVideoConfig, VideoTask, train_video
from video_dit import weights
from video_dit.diffusion.losses import DiffusionConfig
from video_dit.model import VideoDiTConfig
from video_dit.training import OptimizerConfig

NUM_STEPS = 120
WARM_UP = 20  # steps that do not count
NEVER = 10**9


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


def rows_of(storage: str) -> list[dict[str, float]]:
    """What a run logged so far."""
    (file,) = Path(storage).glob("train_video/*/metrics/train.jsonl")
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]
