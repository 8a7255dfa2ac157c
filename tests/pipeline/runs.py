"""What tests read from a training run's folder."""

import json
from pathlib import Path


def losses_of(run):
    lines = (Path(run.uri) / "metrics" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(len(rows)))  # no step twice, none lost
    return [row["loss"] for row in rows]
