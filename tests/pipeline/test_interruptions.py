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


def steps_with_a_look(world, tmp_path, monkeypatch, durations_s) -> list[int]:
    """Numbers of the steps, each of so many seconds, after which a process looked."""
    clock, looked = SimpleNamespace(now_s=0.0, step=0), []
    monkeypatch.setattr(interruptions, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: looked.append(clock.step))
    looks = Interruptions(tmp_path / "stop", world)
    for duration_s in durations_s:
        clock.now_s += duration_s
        clock.step += 1
        looks.look()
    return looked


def test_all_processes_look_after_the_same_steps_every_two_seconds(tmp_path, monkeypatch):
    said = []

    def say(told):
        said.append(told)
        return told

    first = steps_with_a_look(
        SimpleNamespace(rank=0, sum=say), tmp_path, monkeypatch, [0.5] * 10 + [3.0] * 4 + [0.25] * 18
    )
    other = SimpleNamespace(rank=1, sum=lambda told: told + said.pop(0))
    assert first == [1, 5, 9, 13, 14, 15, 23, 31]
    assert steps_with_a_look(other, tmp_path, monkeypatch, [7.0] * 32) == first  # by the clock of rank 0
    assert not said
