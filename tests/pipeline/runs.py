"""What tests read from a training run's folder, and its processes."""

import contextlib
import json
from pathlib import Path

import psutil


def losses_of(run):
    lines = (Path(run.uri) / "metrics" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(len(rows)))  # no step twice, none lost
    return [row["loss"] for row in rows]


def train_workers():
    """The worker processes of this process's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found
