"""Where a run's metrics go besides its own folder: services that people watch. None of them can stop a training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

TrackerName = Literal["wandb", "mlflow"]
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A service that takes numbers."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""

    def close(self) -> None:
        """No more are to come."""


class WandbTracker:
    """Weights & Biases; project and account as its own environment variables say."""

    def __init__(self, run: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(id=run, name=run, resume="allow", config=dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class MlflowTracker:
    """MLflow; server and experiment as its own environment variables say."""

    def __init__(self, run: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow
        earlier = mlflow.search_runs(filter_string=f"attributes.run_name = '{run}'", output_format="list")
        if earlier:
            mlflow.start_run(run_id=earlier[0].info.run_id)
        else:
            mlflow.start_run(run_name=run)
            mlflow.log_dict(dict(config), "run.json")  # its parameters are flat and short

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._client.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        """End the run."""
        self._client.end_run()


TRACKERS: dict[TrackerName, Callable[[str, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


class GuardedTracker:
    """A tracker that is left alone once it fails, with one warning.

    Args:
        name: of the service.
        run: what the run is called there; a resumed run goes on under it where the service can.
        config: of the run.
    """

    def __init__(self, name: TrackerName, run: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._tracker = self._guard(lambda: TRACKERS[name](run, config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        tracker = self._tracker
        if tracker is not None:
            self._guard(lambda: tracker.log(metrics, step))

    def close(self) -> None:
        """No more are to come."""
        tracker = self._tracker
        if tracker is not None:
            self._guard(tracker.close)

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a service does wrong
            logger.warning("%s gets no more metrics of this run: %s: %s", self._name, type(error).__name__, error)
            self._tracker = None
            return None
