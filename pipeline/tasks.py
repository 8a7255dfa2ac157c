"""The work of a hop, in tasks that are done once: a hop that is started again does those that left no record.

A task writes its files, named by their content, and then its record. So a task may be killed at any moment and run any
number of times, on purpose or because Ray lost a node: the same files, the same record, no row twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline import cluster, progress, store
from pipeline.errors import ClipRejected, RejectReason

Record = dict[str, Any]  # JSON-able; "num_rows" and "num_rejects" are shown while the hop runs
MAX_TRIES = 2  # of one unit of work, after the first death that may have been its fault

_TASK = "task"


class Attempt:
    """One try at a task, which remembers what it was working on when its process died.

    The first try keeps no notes. A later one of the same run writes down each unit before it begins with it, so that
    the unit that takes its process down again and again is found.

    Attributes:
        careful: whether an earlier try did not end.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.careful = store.exists(url)
        self._tries: dict[str, int] = store.read_json(url) if self.careful else {}
        if not self.careful:
            self._save()

    def tries(self, unit: str) -> int:
        """How many processes died while they worked on the unit."""
        return self._tries.get(unit, 0)

    @contextlib.contextmanager
    def working_on(self, unit: str) -> Iterator[None]:
        """Around the work on one unit.

        Raises:
            ClipRejected: QUARANTINED, the unit has had its tries.
        """
        died = self.tries(unit)
        if died >= MAX_TRIES:
            raise ClipRejected(RejectReason.QUARANTINED, f"{died + 1} processes died that worked on it")
        if self.careful:
            self._tries[unit] = died + 1
            self._save()
        yield
        self._tries.pop(unit, None)  # it did not kill; written down with the next one

    def _save(self) -> None:
        store.write_json(self._url, self._tries)


@dataclasses.dataclass(frozen=True)
class TaskFolder:
    """Records and notes of a hop's tasks, under the folder that its result will be published in.

    Attributes:
        folder: of the result.
        run: whose notes of deaths count: a task is not to blame for those of another driver.
    """

    folder: str
    run: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12])

    def finished(self) -> dict[int, Record]:
        """The records of all tasks that are done and whose files are there."""
        fs, root = store.filesystem(self.folder)
        if not fs.exists(root):
            return {}
        names = {name[len(root.rstrip("/")) + 1 :]: name for name in fs.find(root)}
        found = {name: path for name, path in names.items() if name.startswith("tasks/") and name.endswith(".json")}
        contents = fs.cat(list(found.values())) if found else {}
        records = {}
        for name, path in found.items():
            record = _parse(contents[path])
            if record is not None and all(file in names for file in record["files"].values()):
                records[int(name.removeprefix("tasks/").removesuffix(".json"))] = record
        return records

    def record(self, task: int) -> Record | None:
        """The record of one task, if it is done and its files are there."""
        url = self._url(task, "json")
        record = _parse(store.read_bytes(url)) if store.exists(url) else None
        whole = record is not None and all(store.exists(store.join(self.folder, f)) for f in record["files"].values())
        return record if whole else None

    def finish(self, task: int, record: Record) -> None:
        """Say that a task's files are written."""
        store.write_json(self._url(task, "json"), record)

    def attempt(self, task: int) -> Attempt:
        """Begin with a task."""
        return Attempt(self._url(task, f"{self.run}.tries"))

    def _url(self, task: int, ending: str) -> str:
        return store.join(self.folder, "tasks", f"{task:07d}.{ending}")


def _parse(content: bytes) -> Record | None:
    with contextlib.suppress(ValueError):
        record = json.loads(content)
        if isinstance(record, dict) and "files" in record:
            return record
    return None  # cut off by a full disk: the task is done again


class _Worker:
    """Actor: a task's table in, its record out."""

    def __init__(self, tasks: TaskFolder, make_work: Callable[[], Callable[[pa.Table, Attempt], Record]]) -> None:
        self._tasks = tasks
        self._work = make_work()

    def __call__(self, table: pa.Table) -> pa.Table:
        task = table[_TASK][0].as_py()
        record = self._tasks.record(task)  # there already, when Ray lost the row that says so
        if record is None:
            record = self._work(table.drop_columns([_TASK]), self._tasks.attempt(task))
            self._tasks.finish(task, record)
        return pa.table({_TASK: [task], "record": [json.dumps(record)]})


def run_tasks(
    folder: str,
    tables: Sequence[pa.Table],
    make_work: Callable[[], Callable[[pa.Table, Attempt], Record]],
    *,
    label: str,
    num_rows: int,
    num_actors: int,
    num_gpus: float = 0.0,
) -> list[Record]:
    """Do what is left of a hop's tasks on a pool of actors.

    Args:
        folder: of the result; records go to `tasks/` in it. It must mean these tables and nothing else.
        tables: one a task.
        make_work: makes, in each actor, the function from a table to its record. A record has `files` (names by table,
            relative to the folder), `num_rows` (of the input, done) and `num_rejects`.
        label: of the progress line.
        num_rows: of all tasks.
        num_actors: most processes at a time; those that find nothing to do go.
        num_gpus: of each.

    Returns:
        the records, in the order of the tables.
    """
    tasks = TaskFolder(folder)
    done = tasks.finished()
    left = [task for task in range(len(tables)) if task not in done]
    with progress.rows(label, num_rows, sum(record["num_rows"] for record in done.values())) as advance:
        for task, record in _run(tasks, {task: tables[task] for task in left}, make_work, num_actors, num_gpus):
            done[task] = record
            advance(record["num_rows"], record["num_rejects"])
    return [done[task] for task in range(len(tables))]


def _run(
    tasks: TaskFolder,
    tables: dict[int, pa.Table],
    make_work: Callable[[], Callable[[pa.Table, Attempt], Record]],
    num_actors: int,
    num_gpus: float,
) -> Iterator[tuple[int, Record]]:
    if not tables:
        return
    cluster.connect()
    blocks = [
        table.append_column(_TASK, pa.array([task] * table.num_rows, pa.int64())) for task, table in tables.items()
    ]
    size = min(num_actors, len(blocks))
    records = ray.data.from_arrow(blocks).map_batches(
        _Worker,
        batch_size=None,  # a block is a task
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size),
        num_cpus=1,
        num_gpus=num_gpus or None,
        fn_constructor_args=(tasks, make_work),
    )
    for row in records.iter_rows():
        yield row[_TASK], json.loads(row["record"])
