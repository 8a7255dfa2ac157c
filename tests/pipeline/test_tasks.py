"""Tasks that are done once: records, deaths of workers, what is in the way."""

import json
from functools import partial

import pyarrow as pa
import pytest

from pipeline.errors import ClipRejected
from pipeline.tasks import MAX_TRIES, TaskFolder, run_tasks
from tests.pipeline.poison import Work

TABLES = [pa.table({"value": [task, task + 1]}) for task in range(6)]


def run(folder, poison=None):
    folder.mkdir(exist_ok=True)
    made = partial(Work, str(folder), poison)
    return run_tasks(str(folder), TABLES, made, label="test", num_rows=12, num_actors=2)


def calls(folder):
    return sorted(int(line) for line in (folder / "calls").read_text().split())


def test_each_task_is_done_once_and_again_when_its_record_or_file_is_gone(ray_cluster, tmp_path):
    records = run(tmp_path / "out")
    assert [record["files"]["sums"] for record in records] == [f"sum-{task}.json" for task in range(6)]
    assert calls(tmp_path / "out") == [0, 1, 2, 3, 4, 5]
    assert run(tmp_path / "out") == records
    (tmp_path / "out" / "tasks" / "0000002.json").write_text('{"files": {"su')  # the disk was full
    (tmp_path / "out" / "tasks" / "0000003.json").unlink()
    (tmp_path / "out" / "sum-4.json").unlink()
    assert run(tmp_path / "out") == records
    assert calls(tmp_path / "out") == [0, 1, 2, 2, 3, 3, 4, 4, 5]


def test_what_kills_its_workers_is_quarantined_and_nothing_else(ray_cluster, tmp_path):
    records = run(tmp_path / "out", poison=3)
    died = [[3, "quarantined"]]
    assert [record["quarantined"] for record in records] == [[], [], died, died, [], []]
    assert [record["num_rows"] for record in records] == [2] * 6
    counts = {task: calls(tmp_path / "out").count(task) for task in range(6)}
    assert counts[2] >= MAX_TRIES + 2  # deaths, then the try that went round it
    assert counts[3] >= MAX_TRIES + 2


def test_notes_of_deaths(tmp_path):
    tasks = TaskFolder(str(tmp_path), run="a")
    first = tasks.attempt(0)
    with first.working_on("x"):
        pass
    assert not first.careful
    for death in range(MAX_TRIES):
        attempt = tasks.attempt(0)
        with attempt.working_on("w"):
            pass
        assert (attempt.careful, attempt.tries("x")) == (True, death)
        attempt.working_on("x").__enter__()  # dies here
    with pytest.raises(ClipRejected, match="quarantined: 3 processes died"), tasks.attempt(0).working_on("x"):
        pass
    assert tasks.attempt(0).tries("w") == 0
    assert not TaskFolder(str(tmp_path), run="b").attempt(0).careful  # another run starts anew
    assert not tasks.attempt(1).careful


def test_records_of_nothing(tmp_path):
    assert TaskFolder(str(tmp_path / "none")).finished() == {}
    tasks = TaskFolder(str(tmp_path))
    tasks.finish(3, {"files": {}, "num_rows": 1})
    assert tasks.finished() == {3: {"files": {}, "num_rows": 1}}
    assert tasks.record(3) == {"files": {}, "num_rows": 1}
    assert tasks.record(2) is None
    assert json.loads((tmp_path / "tasks" / "0000003.json").read_text())["num_rows"] == 1
