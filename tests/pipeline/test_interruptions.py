"""When a run saves at once: before a machine goes away, and when it is stopped."""

from types import SimpleNamespace

import pytest
import ray.train

from pipeline import interruptions
from pipeline.interruptions import Asked, Interruptions


@pytest.fixture
def looking(tmp_path, monkeypatch):
    """Looks at every step; `machine.deadline_ms` is when one goes away."""
    machine = SimpleNamespace(deadline_ms=None)
    world = SimpleNamespace(rank=0, sum=lambda value: value)
    monkeypatch.setattr(interruptions, "LOOK_EVERY_S", -1.0)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: machine if machine.deadline_ms else None)
    return Interruptions(tmp_path / "stop", world), machine


def test_a_machine_that_goes_away_is_saved_for_once(looking):
    interruptions, machine = looking
    assert interruptions.look() == Asked(save=False, stop=False)
    machine.deadline_ms = 1000
    assert interruptions.look() == Asked(save=True, stop=False)
    assert interruptions.look() == Asked(save=False, stop=False)
    machine.deadline_ms = 2000  # the next one
    assert interruptions.look() == Asked(save=True, stop=False)
    machine.deadline_ms = None
    assert interruptions.look() == Asked(save=False, stop=False)


def test_a_stop_file_stops(looking, tmp_path):
    interruptions, _ = looking
    (tmp_path / "stop").touch()
    assert interruptions.look() == Asked(save=False, stop=True)


def test_nobody_looks_between(tmp_path, monkeypatch):
    world = SimpleNamespace(rank=0, sum=lambda value: value)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: pytest.fail("all ranks would have to wait"))
    (tmp_path / "stop").touch()
    assert Interruptions(tmp_path / "stop", world).look() == Asked(save=False, stop=False)
