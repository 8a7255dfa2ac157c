"""`ray job submit --working-dir . -- python jobs/train_video.py` on a cluster of its own, tokens on."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """The environment and dashboard URL of a cluster started with `ray start --head`, as a user would."""
    session = tempfile.mkdtemp(prefix="kr", dir="/tmp")  # short: sockets below it have a limit of 107 characters
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": session,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += [f"--temp-dir={session}", "--dashboard-agent-listen-port", str(free_port())]
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_dashboard(url, head)
        yield environment, url
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:  # SIGTERM takes half a minute
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def wait_for_dashboard(url, head, timeout_s=120):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert head.poll() is None, "ray start ended"
        try:
            urllib.request.urlopen(f"{url}/api/jobs/", timeout=5)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):  # up, and it asks for a token
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(url)


def submit(cluster, *words, **environment):
    variables, url = cluster
    command = [RAY, "job", "submit", "--address", url, "--working-dir", ".", "--", "python", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**variables, **environment}, capture_output=True, text=True, check=False, timeout=600
    )


def test_the_whole_training_runs_as_a_submitted_job(cluster, tmp_path):
    run = submit(cluster, "jobs/train_video.py", "smoke_cpu", "--storage", str(tmp_path))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (result,) = [line.removeprefix("result: ") for line in run.stdout.splitlines() if line.startswith("result: ")]
    assert Path(result).is_relative_to(tmp_path)
    assert (Path(result) / "manifest.json").exists()
    assert (Path(result) / "models" / "step-20" / "model_index.json").exists()
    assert list(tmp_path.glob("sample_video/*/contact_sheet.png"))


def test_relative_storage_of_a_submitted_job_outlives_it(cluster):
    variables, _ = cluster
    run = submit(cluster, "jobs/make_toy_clips.py", "smoke_cpu")
    assert run.returncode == 0, run.stdout[-3000:]
    (result,) = [line.removeprefix("result: ") for line in run.stdout.splitlines() if line.startswith("result: ")]
    assert Path(result).is_relative_to(Path(variables["HOME"]) / "kinoray" / "runs")
    assert len(list(Path(result, "clips").glob("*.txt"))) == 48


def test_without_the_token_nothing_is_accepted(cluster):
    run = submit(cluster, "jobs/make_toy_clips.py", "smoke_cpu", RAY_AUTH_TOKEN="wrong" * 8)
    assert run.returncode != 0
    assert "authentication" in run.stdout + run.stderr
