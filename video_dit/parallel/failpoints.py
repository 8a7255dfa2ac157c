"""Places where tests let a process die, to show that nothing is lost there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "KINORAY_FAILPOINTS"  # such as "before_commit:3,mid_prune": the third time there, the first time here
ONCE = "KINORAY_FAILPOINTS_ONCE"  # a folder of marks: each place kills one process, however many reach it

_passed: dict[str, int] = {}


def reach(name: str) -> None:
    """Kill this process if the environment says that it dies here."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    _passed[name] = _passed.get(name, 0) + 1
    for place in wanted.split(","):
        where, _, number = place.partition(":")
        if where == name and _passed[name] == int(number or 1) and _is_first(place):
            os.kill(os.getpid(), signal.SIGKILL)


def _is_first(place: str) -> bool:
    folder = os.environ.get(ONCE)
    if folder is None:
        return True
    try:
        Path(folder, place).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
