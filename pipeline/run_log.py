"""All places where a training run's metrics go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import store
from pipeline.metrics import TrainGauges
from pipeline.metrics_log import MetricsLog
from pipeline.trackers import GuardedTracker, TrackerName
from video_dit.flops import measured_peak, peak_flops


class RunLog:
    """The run's own files, Ray's metrics and the trackers. On one process.

    Args:
        root: the run's folder, with `run.json`.
        folder: of the metrics.
        start_step: the first that is to come.
        num_workers: that share the steps.
        trackers: services.
    """

    def __init__(
        self, root: Path, folder: Path, start_step: int, num_workers: int, trackers: Sequence[TrackerName]
    ) -> None:
        self._file = MetricsLog(folder, start_step=start_step)
        self._gauges = TrainGauges(root.name)
        config = store.read_json(str(root / "run.json"))
        self._trackers = [GuardedTracker(name, root.name, config) for name in trackers]
        self._num_workers = num_workers
        self.peak_flops = num_workers * _peak()  # of all workers; 0 where it is not known

    def write(self, metrics: dict[str, float], stall_s: float) -> None:
        """Log a step; `stall_s` is what the checkpoint before it cost."""
        flops, step_s = metrics.pop("flops"), metrics["step_s"]
        row = {**metrics, "num_workers": self._num_workers, "checkpoint_stall_s": stall_s, "time_s": time.time()}
        row["tokens_per_s"] = metrics["num_tokens"] / step_s
        if flops and self.peak_flops:
            row["mfu"] = flops / step_s / self.peak_flops
        self._file.write(row)
        self._gauges.show(row)
        for tracker in self._trackers:
            tracker.log(row, int(row["step"]))

    def close(self) -> None:
        """The run is done."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _peak() -> float:
    """Of this process's device; 0 where it is not known."""
    if torch.cuda.is_available():
        return peak_flops(torch.cuda.get_device_name()) or 0.0
    return measured_peak()
