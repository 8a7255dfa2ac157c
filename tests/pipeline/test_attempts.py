"""One attempt at a time writes a run's folder."""

import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline.attempts import Attempts
from pipeline.errors import RunBusyError, RunTakenOverError


def test_a_second_attempt_waits_for_the_first_and_is_newer(tmp_path):
    attempts, numbers = Attempts(tmp_path), []
    with attempts.claim() as first:

        def second():
            with Attempts(tmp_path).claim() as number:
                numbers.append(number)

        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        assert numbers == []
        attempts.check(first)
    thread.join()
    assert numbers == [first + 1]
    attempts.check(first + 1)
    with pytest.raises(RunTakenOverError, match=f"attempt {first + 1} has taken over from attempt {first}"):
        attempts.check(first)


def test_a_run_at_work_is_refused_with_its_process(tmp_path):
    busy = pytest.raises(RunBusyError, match=f"process {os.getpid()} on .*: wait for it")
    with Attempts(tmp_path).claim(), busy, Attempts(tmp_path).claim(patience_s=1.5):
        pass


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path):
    script = (
        "import os, pathlib, sys; from pipeline.attempts import Attempts\n"
        "with Attempts(pathlib.Path(sys.argv[1])).claim(): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    start_s = time.monotonic()
    with Attempts(tmp_path).claim() as number:
        assert number == 2
    assert time.monotonic() - start_s < 5


def test_one_of_another_machine_is_when_it_is_silent(tmp_path):
    (tmp_path / "attempts").mkdir()
    file = tmp_path / "attempts" / "000004.json"
    file.write_text('{"host": "elsewhere", "pid": 1, "began_s": 0}')
    with pytest.raises(RunBusyError, match="process 1 on elsewhere"), Attempts(tmp_path).claim(patience_s=0.5):
        pass
    os.utime(file, (0, 0))
    with Attempts(tmp_path).claim() as number:
        assert number == 5


def test_an_attempt_that_died_as_it_began_does_not_count_for_ever(tmp_path):
    (tmp_path / "attempts").mkdir()
    file = tmp_path / "attempts" / "000001.json"
    file.write_text('{"host": ')
    os.utime(file, (0, 0))
    with Attempts(tmp_path).claim() as number:
        assert number == 2
