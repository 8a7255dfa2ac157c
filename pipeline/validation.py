"""Looks at the models of a training run while it goes on, with resources of its own: no rank waits for it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import ray

from pipeline.heap import keep_freed_memory
from pipeline.metrics_log import log_scalars, log_videos
from pipeline.trainee import Task

FILE = "validation.jsonl"
logger = logging.getLogger(__name__)


class Validator:
    """Measures exported models and shows their videos in TensorBoard, one after the other.

    Args:
        task: of the run.
        folder: for the metrics.
    """

    def __init__(self, task: Task, folder: str) -> None:
        keep_freed_memory()
        self._trainee, self._folder = task.build(), Path(folder)

    def look(self, model: str, step: int) -> dict[str, float]:
        """Figures of an exported model folder; they are logged as well."""
        start_s = time.monotonic()
        figures = self._trainee.measure(model)
        videos, fps = self._trainee.show(model)
        log_videos(self._folder, step, videos, fps)
        log_scalars(self._folder, "validation", step, figures)
        row = {"step": step, **figures, "seconds": time.monotonic() - start_s}
        with (self._folder / FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")
        return figures


def start_validator(task: Task, folder: Path, num_cpus: float, num_gpus: float) -> Any:
    """The actor; it begins when the first model is there."""
    folder.mkdir(parents=True, exist_ok=True)
    actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=3)(Validator)
    return actor.remote(task, str(folder))


def last_figures(folder: Path, step: int) -> dict[str, float]:
    """Figures of a step's model, "validation_loss" and so on; {} if it was not looked at."""
    file = folder / FILE
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = [row for row in rows if row["step"] == step]
    return {f"validation_{name}": value for name, value in (found[-1] if found else {}).items() if name != "step"}


def wait_for(look: Any) -> None:
    """Until a model was looked at; what goes wrong there is a warning."""
    try:
        ray.get(look)
    except ray.exceptions.RayError as error:
        logger.warning("validation failed, training did not: %s", str(error).strip().splitlines()[-1])
