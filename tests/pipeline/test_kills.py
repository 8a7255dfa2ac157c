"""SIGKILL at random moments: of a worker, of the driver, of the whole cluster. Nothing is lost, nothing is doubled.

KINORAY_KILLS is the number of kills of each kind (default 1), KINORAY_KILLED_FILES that of the source's files (24).
"""

import collections
import contextlib
import os
import random
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import media, store
from tests.pipeline.clip_files import moving
from tests.pipeline.test_encode import model  # noqa: F401 - a fixture

NUM_KILLS = int(os.environ.get("KINORAY_KILLS", "1"))
NUM_FILES = int(os.environ.get("KINORAY_KILLED_FILES", "24"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Small videos, one in ten of no use, one a copy."""
    folder = tmp_path_factory.mktemp("kills") / "videos"
    folder.mkdir()
    for number in range(NUM_FILES):
        video = media.encode_mp4(moving(9 + number % 3 * 8, 64, 64 + 32 * (number % 2)), 8)
        unlike = struct.pack(">I4sI", 12, b"free", number)  # a box that means nothing: no two files are equal
        (folder / f"clip_{number:04}.mp4").write_bytes(video + unlike)
    for number in range(0, NUM_FILES, 10):
        (folder / f"clip_{number:04}.mp4").write_bytes(b"no video")
    (folder / "copy.mp4").write_bytes((folder / "clip_0001.mp4").read_bytes())
    return folder


class Job:
    """The hops as a process with a local cluster of its own."""

    def __init__(self, source, storage, model_uri):
        command = [sys.executable, "-m", "tests.pipeline.hops", str(source), str(storage), model_uri]
        home = storage.parent / "home"
        home.mkdir(exist_ok=True)
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(home), "RAY_ADDRESS": "local"}
        self._log = storage.with_suffix(".log").open("a")
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self._family = set()

    def family(self):
        """The driver's descendants: Ray's own processes, workers, decoders."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return {process for process in self._family if process.is_running()}

    def kill(self, kind, chance):
        """Kill one worker, the driver, or all; False if there was nothing of the kind."""
        family = self.family()
        if kind == "worker":
            workers = [process for process in family if "ray::MapWorker" in name_of(process)]
            if workers:
                chance.choice(workers).kill()
            return bool(workers)
        self.process.kill()
        if kind == "cluster":
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.end()
        return True

    def end(self):
        """Wait for the driver and its workers; its digests."""
        digests, _ = self.process.communicate(timeout=300)
        ours = [process for process in self.family() if re.search("MapWorker|decode_child", name_of(process))]
        _, alive = psutil.wait_procs(ours, timeout=60)
        assert not alive, f"{[name_of(process) for process in alive]} outlive their driver"
        for process in self.family():  # Ray's agents take longer to notice
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._log.close()
        return re.findall("(?<=digest: ).*", digests)  # Ray writes there, too


def name_of(process):
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def run_with_kills(kind, source, storage, model_uri):
    """Kill as often as asked, at moments spread over the job's tasks; the digests of the run that ends."""
    chance = random.Random(kind)
    num_tasks = len(Path(source).parent.joinpath("tasks").read_text().split())
    moments = collections.deque(sorted(chance.sample(range(num_tasks - 4), NUM_KILLS)))
    job, num_kills = Job(source, storage, model_uri), 0
    while job.process.poll() is None:
        time.sleep(0.02)
        job.family()
        if moments and len(list(storage.glob("*/*/tasks/*.json"))) >= moments[0]:
            time.sleep(chance.random() / 2)
            if job.process.poll() is None and job.kill(kind, chance):
                moments.popleft()
                num_kills += 1
                if kind != "worker":
                    job = Job(source, storage, model_uri)
    sys.stdout.write(f"{num_kills} kills of a {kind}\n")
    assert job.process.returncode == 0
    assert num_kills >= max(1, NUM_KILLS - 1)  # the last moment may come too late
    return job.end()


@pytest.fixture(scope="module")
def undisturbed(source, model, tmp_path_factory):  # noqa: F811
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    job = Job(source, storage, model.uri)
    digests = job.end()
    assert job.process.returncode == 0
    source.parent.joinpath("tasks").write_text("\n".join(map(str, storage.glob("*/*/tasks/*.json"))))
    return digests


@pytest.mark.parametrize("kind", ["worker", "driver", "cluster"])
def test_killed_at_any_moment_the_result_is_the_same(kind, source, model, undisturbed, tmp_path):  # noqa: F811
    storage = tmp_path / "runs"
    assert run_with_kills(kind, source, storage, model.uri) == undisturbed
    (clips,), (latents,) = (
        [store.Manifest.load(str(path.parent)) for path in storage.glob(f"{verb}/*/manifest.json")]
        for verb in ("curate", "encode")
    )
    num_bad = len(range(0, NUM_FILES, 10))
    assert clips.counts == {"sources": NUM_FILES + 1, "clips": NUM_FILES - num_bad, "rejects": num_bad + 1}
    ids = latents.read("latents")["clip_id"].to_pylist()
    assert ids == clips.read("clips")["clip_id"].to_pylist()
    assert len(set(ids)) == len(ids) == NUM_FILES - num_bad
