"""Who may write a run's folder: the newest attempt, and no other.

Each attempt makes `attempts/NNNNNN.json` and keeps touching it while it lives. A new one waits until the last one is
silent, then takes the run over; workers of an older attempt that are still alive find that out before they write.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.errors import RunBusyError, RunTakenOverError

BEAT_S = 2.0
SILENT_S = 10.0  # without a beat for so long, an attempt is dead
FOLDER = "attempts"


class Attempts:
    """Attempts at a run, on a file system that all of them share.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER

    @contextlib.contextmanager
    def claim(self, patience_s: float = 2 * SILENT_S) -> Iterator[int]:
        """Own the run inside the block; yields the attempt's number.

        Raises:
            RunBusyError: another attempt is at work, and still is after `patience_s`.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_silence(patience_s)
        number = self._make_next()
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(self._file(number), stop), daemon=True, name="attempt")
        thread.start()
        try:
            yield number
        finally:
            stop.set()
            thread.join()
            os.utime(self._file(number), (0, 0))  # silent from now on

    def check(self, number: int) -> None:
        """Raises RunTakenOverError if there is an attempt newer than this one."""
        newest = self._newest()
        if newest > number:
            raise RunTakenOverError(f"{self._folder.parent}: attempt {newest} has taken over from attempt {number}")

    def _wait_for_silence(self, patience_s: float) -> None:
        start_s = time.monotonic()
        while (newest := self._newest()) and not self._is_silent(newest):
            who = self._who(newest)
            if time.monotonic() - start_s > patience_s:
                raise RunBusyError(
                    f"{self._folder.parent} is being trained by process {who.get('pid')} on {who.get('host')}: "
                    "wait for it, or stop it first"
                )
            if time.monotonic() - start_s < BEAT_S / 2:
                console.say(f"waiting for attempt {newest} (process {who.get('pid')} on {who.get('host')}) to end")
            time.sleep(BEAT_S / 2)

    def _make_next(self) -> int:
        number = self._newest() + 1
        try:
            with self._file(number).open("x") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "began_s": time.time()}, file)
        except FileExistsError:
            raise RunBusyError(f"{self._folder.parent}: another attempt has just begun") from None
        return number

    def _beat(self, file: Path, stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            os.utime(file)

    def _is_silent(self, number: int) -> bool:
        """By the file system's clock alone."""
        clock = self._folder / f"clock-{os.getpid()}"
        clock.write_bytes(b"")
        now_s = clock.stat().st_mtime
        clock.unlink()
        return now_s - self._file(number).stat().st_mtime > SILENT_S or self._is_dead_here(number)

    def _is_dead_here(self, number: int) -> bool:
        """Whether it was a process of this machine that is gone."""
        who = self._who(number)
        if who.get("host") != socket.gethostname():
            return False
        try:
            os.kill(who["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _who(self, number: int) -> dict[str, Any]:
        """Host, pid and time of an attempt; nothing if it died while it wrote them."""
        content = self._file(number).read_text()
        return dict(json.loads(content)) if content.endswith("}") else {}

    def _newest(self) -> int:
        return max((int(file.stem) for file in self._folder.glob("*.json")), default=0)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"
