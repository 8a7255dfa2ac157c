"""The share of a run's time that goes into steps that count, while its workers are killed."""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from training_runs import NEVER, Bench

TAIL_BYTES = 1 << 16  # of the log, many seconds of it
CHECKPOINT_S = STEP_S = 0.2  # roughly, of the toy world's transformer


def goodput(bench: Bench, seconds: float, kill_every_s: float) -> dict[str, Any]:
    """The share of the time that went into steps that counted, under kills.

    Checkpoints are as far apart as Young's formula says (CACM 17, 1974): sqrt(2 * time of one * time between kills).
    """
    checkpoint_every = round((2 * CHECKPOINT_S * kill_every_s) ** 0.5 / STEP_S)
    storage, chance, kills = bench.new_folder(), random.Random(0), []
    errors: list[Exception] = []

    def train() -> None:
        try:
            bench.train(NEVER, storage, num_workers=2, checkpoint_every=checkpoint_every, max_failures=NEVER)
        except Exception as error:  # also when the cluster goes, after the end
            errors.append(error)

    start_s = time.time()
    threading.Thread(target=train, daemon=True).start()
    watch = Watch(storage)
    while time.time() - start_s < seconds:
        time.sleep(1.0)  # less than a restart takes
        if errors:
            raise errors[0]
        watch.look()
        if watch.began_s and time.time() - max([watch.began_s, *kills]) > kill_every_s:
            victims = train_workers()
            if victims:
                chance.choice(victims).kill()
                kills.append(time.time())
    watch.look()
    figures = {"kills": len(kills), "minutes": seconds / 60, "checkpoint_every": checkpoint_every}
    return {**watch.split(start_s, kills), **figures}


class Watch:
    """Follows a run's log through its restarts."""

    def __init__(self, storage: str) -> None:
        self._storage = storage
        self.seen: dict[tuple[int, float], dict[str, float]] = {}  # every time that a step was done
        self.began_s = 0.0

    def look(self) -> None:
        """Read what is new: the end of the log, which a restart cuts back to its checkpoint seconds after a kill."""
        for file in Path(self._storage).glob("train_video/*/metrics/train.jsonl"):
            with file.open("rb") as log:
                log.seek(max(0, log.seek(0, 2) - TAIL_BYTES))
                lines = log.read().decode().split("\n")[:-1]
            for row in map(json.loads, filter(lambda line: line.startswith("{"), lines)):
                self.seen[int(row["step"]), row["time_s"]] = row
        if self.seen and not self.began_s:
            self.began_s = min(time_s for _, time_s in self.seen)

    def split(self, start_s: float, kills: list[float]) -> dict[str, Any]:
        """Seconds by what they were spent on, from the start to the last step."""
        rows = sorted(self.seen.values(), key=lambda row: row["time_s"])
        end_s, step_s = rows[-1]["time_s"], statistics.median(row["step_s"] for row in rows)
        last = {int(row["step"]): row for row in rows}  # the time that counted
        elapsed_s = end_s - start_s
        good_s = sum(row["step_s"] - row["data_wait_s"] for row in last.values())
        lost = [row for row in rows if last[int(row["step"])] is not row]
        restarts = []
        for kill_s in kills:
            before = max((row["time_s"] for row in rows if row["time_s"] <= kill_s), default=kill_s)
            after = min((row["time_s"] for row in rows if row["time_s"] > kill_s + 1), default=None)
            if after is not None:
                restarts.append(after - before - step_s)
        seconds = {
            "productive": good_s,
            "start": rows[0]["time_s"] - start_s,
            "restarts": sum(restarts),
            "steps done again": sum(row["step_s"] for row in lost),
            "data wait": sum(row["data_wait_s"] for row in last.values()),
            "checkpoint stall": sum(row["checkpoint_stall_s"] for row in last.values()),
        }
        seconds["other"] = elapsed_s - sum(seconds.values())
        since_first_s = end_s - rows[0]["time_s"]
        return {
            "goodput": good_s / since_first_s,
            "goodput_with_start": good_s / elapsed_s,
            "restart_s": statistics.median(restarts) if restarts else None,
            "steps": len(last),
            "share": {name: value / elapsed_s for name, value in seconds.items()},
        }


def train_workers() -> list[psutil.Process]:
    """The worker processes of this process's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found
