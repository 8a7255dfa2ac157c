"""Every metric that Ray collects from this system: name, unit and meaning in one place (dashboard, Metrics)."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

# Name -> what it says. Units are in the names.
TRAIN_METRICS = {
    "kinoray_train_step": "Steps done",
    "kinoray_train_loss": "Loss of the last step",
    "kinoray_train_grad_norm": "Norm of the gradient before clipping",
    "kinoray_train_tokens_per_s": "Tokens a second, of all workers",
    "kinoray_train_mfu": "Model operations a second as a share of what the hardware can do",
    "kinoray_train_data_wait_s": "Seconds that the last step waited for its data",
    "kinoray_train_checkpoint_stall_s": "Seconds that the last step waited for a checkpoint",
    "kinoray_train_num_workers": "Workers that share a step",
}


class TrainGauges:
    """Shows a run's numbers to Ray.

    Args:
        run: its name, the label of all of them.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in TRAIN_METRICS.items()}
        self._tags = {"run": run}

    def show(self, metrics: Mapping[str, float]) -> None:
        """Numbers of a step by their names in the log; those that no gauge is for are left out."""
        for name, gauge in self._gauges.items():
            value = metrics.get(name.removeprefix("kinoray_train_"))
            if value is not None:
                gauge.set(value, tags=self._tags)
