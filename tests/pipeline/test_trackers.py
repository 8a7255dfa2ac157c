"""Services get a run's numbers; one that fails is left alone."""

import logging
import sys
import types

import pytest

from pipeline.trackers import GuardedTracker


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the package: remembers what it was told."""
    calls = []
    module = types.ModuleType("wandb")

    class Run:
        def log(self, metrics, step):
            calls.append(("log", metrics, step))
            if step == 3:
                raise ConnectionError("no route")

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options))
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_a_tracker_gets_what_is_logged(wandb):
    tracker = GuardedTracker("wandb", "video-abc", {"lr": 1})
    tracker.log({"loss": 0.5}, 1)
    tracker.close()
    assert wandb == [
        ("init", {"id": "video-abc", "name": "video-abc", "resume": "allow", "config": {"lr": 1}}),
        ("log", {"loss": 0.5}, 1),
        ("finish",),
    ]


def test_one_that_fails_is_left_alone_with_one_warning(wandb, caplog):
    tracker = GuardedTracker("wandb", "run", {})
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            tracker.log({"loss": 0.5}, step)
        tracker.close()
    assert [call[2] for call in wandb if call[0] == "log"] == [0, 1, 2, 3]
    assert [record.message for record in caplog.records] == [
        "wandb gets no more metrics of this run: ConnectionError: no route"
    ]


def test_a_service_that_is_not_installed_is_no_reason_to_stop(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with caplog.at_level(logging.WARNING):
        tracker = GuardedTracker("mlflow", "run", {})
        tracker.log({"loss": 0.5}, 1)
        tracker.close()
    assert "mlflow gets no more metrics of this run: ModuleNotFoundError" in caplog.text


@pytest.fixture
def mlflow(monkeypatch):
    """Stands for the package: keeps runs by name."""
    calls, runs = [], {}
    module = types.ModuleType("mlflow")

    def start_run(run_name=None, run_id=None):
        calls.append(("start", run_name, run_id))
        if run_name:
            runs[run_name] = f"id of {run_name}"

    def search_runs(filter_string, output_format):
        assert output_format == "list"
        name = filter_string.removeprefix("attributes.run_name = ").strip("'")
        info = types.SimpleNamespace(run_id=runs.get(name))
        return [types.SimpleNamespace(info=info)] if name in runs else []

    module.start_run, module.search_runs = start_run, search_runs
    module.log_dict = lambda values, file: calls.append((file, values))
    module.log_metrics = lambda metrics, step: calls.append((metrics, step))
    module.end_run = lambda: calls.append("end")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_mlflow_gets_them_too_and_a_resumed_run_goes_on_under_its_name(mlflow):
    for step in (7, 8):
        tracker = GuardedTracker("mlflow", "run", {"lr": 1})
        tracker.log({"loss": 0.5}, step)
        tracker.close()
    assert mlflow == [
        ("start", "run", None),
        ("run.json", {"lr": 1}),
        ({"loss": 0.5}, 7),
        "end",
        ("start", None, "id of run"),
        ({"loss": 0.5}, 8),
        "end",
    ]
