"""One worker against a real store and real files, without Ray."""

import hashlib
import io
import threading
import time
from dataclasses import replace
from pathlib import Path

import av
import fake_generator
import numpy as np
import pytest
from PIL import Image

from pipeline import store as urls
from pipeline.serve import files, schemas
from pipeline.serve.config import ServeConfig
from pipeline.serve.database import Status
from pipeline.serve.jobs import JobStore
from pipeline.serve.worker import Worker
from video_dit.generator import GenerationRequest


@pytest.fixture
def config(tmp_path):
    return ServeConfig(
        model=f"{tmp_path}/toy", storage=f"{tmp_path}/out", generator="fake_generator", lease_s=1.0, poll_s=0.02
    )


@pytest.fixture
def jobs(config):
    jobs = JobStore(config.database_url)
    yield jobs
    jobs.close()


def submit(config, jobs, **fields):
    return jobs.submit(schemas.new_job(fields, "", None, config, fake_generator.LIMITS), 10)[0]


def make_worker(config, jobs):
    return Worker(config, jobs, fake_generator.Generator())


def wait_until(condition, timeout_s=30.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.02)


def decode(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return float(stream.average_rate), np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        )


def test_a_job_leaves_the_video_its_pictures_and_what_made_them(config, jobs):
    job = submit(config, jobs, prompt="a ball", seed=40, num_frames=9, size="48x32", fps=12, num_inference_steps=3)
    assert make_worker(config, jobs).run_one()
    done = jobs.get(job.id, "")
    assert (done.status, done.attempt, done.steps_done) == (Status.COMPLETED, 1, 3)
    stored = {variant: files.StoredFile(**done.files[variant]) for variant in files.Variant}
    for file in stored.values():
        data = urls.read_bytes(file.url)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size_bytes, file.sha256)
    fps, frames = decode(urls.read_bytes(stored[files.Variant.VIDEO].url))
    expected = fake_generator.frames(GenerationRequest(**job.request)).numpy()
    assert fps == 12
    assert frames.shape == (9, 32, 48, 3)
    assert np.abs(frames.astype(int) - expected).max() <= 3
    thumbnail = np.asarray(Image.open(io.BytesIO(urls.read_bytes(stored[files.Variant.THUMBNAIL].url))))
    assert np.array_equal(thumbnail, expected[4])
    metadata = urls.read_json(f"{config.storage}/videos/{job.id}/{job.id}.1.json")
    assert metadata["request"] == job.request
    assert metadata["files"] == done.files


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ("bad", "invalid_input", "num_frames=3 is not 1 + a multiple of 4"),
        ("broken", "internal", "RuntimeError in the model; the server's log has the details"),
        ("huge", "out_of_memory", "not enough memory: ask for fewer frames or a smaller size"),
    ],
)
def test_a_job_at_fault_fails_alone(config, jobs, prompt, code, message):
    bad, good = submit(config, jobs, prompt=prompt), submit(config, jobs, prompt="good")
    worker = make_worker(config, jobs)
    assert worker.run_one()
    assert worker.run_one()
    failed = jobs.get(bad.id, "")
    assert (failed.status, failed.error_code, failed.error_message) == (Status.FAILED, code, message)
    assert jobs.get(good.id, "").status == Status.COMPLETED


def test_a_deleted_job_stops_at_its_next_step_and_leaves_nothing(config, jobs):
    job = submit(config, jobs, prompt="slow", num_inference_steps=100)
    thread = threading.Thread(target=make_worker(config, jobs).run_one)
    thread.start()
    wait_until(lambda: jobs.get(job.id, "").steps_done > 0)
    jobs.delete(job.id, "")
    start_s = time.monotonic()
    thread.join()
    assert time.monotonic() - start_s < 5  # 100 steps take 10 s
    assert not Path(config.storage, "videos", job.id).exists()


def test_a_worker_that_lost_its_job_removes_what_it_wrote(config, jobs, monkeypatch):
    job = submit(config, jobs, prompt="a ball")
    write = files.write_files

    def write_too_late(*arguments):
        written = write(*arguments)
        jobs.delete(job.id, "")
        return written

    monkeypatch.setattr(files, "write_files", write_too_late)
    assert make_worker(config, jobs).run_one()
    assert list(Path(config.storage, "videos", job.id).iterdir()) == []


def test_the_winner_removes_what_a_dead_attempt_left(config, jobs):
    job = submit(config, jobs, prompt="a ball")
    jobs.release(jobs.claim("dead", config.name, 1.0, 3))
    urls.write_bytes(f"{config.storage}/videos/{job.id}/{job.id}.1.mp4", b"half")
    assert make_worker(config, jobs).run_one()
    names = {path.name for path in Path(config.storage, "videos", job.id).iterdir()}
    assert names == {f"{job.id}.2.{ending}" for ending in ("mp4", "thumbnail.png", "sheet.png", "json")}


def test_the_lease_is_kept_through_long_steps(config, jobs):
    config = replace(config, lease_s=2.0)
    job = submit(config, jobs, prompt="a ball")
    started = threading.Event()

    class Long:
        def __call__(self, requests, on_step=None):
            started.set()
            time.sleep(2 * config.lease_s)
            return fake_generator.Generator()(requests, on_step)

    worker = Worker(config, jobs, Long())
    worker.start()
    assert started.wait(30)

    def is_completed():
        assert jobs.claim("thief", config.name, config.lease_s, 3) is None
        return jobs.get(job.id, "").status == Status.COMPLETED

    wait_until(is_completed)
    assert jobs.get(job.id, "").attempt == 1
    assert jobs.num_workers(config.name, config.lease_s) == 1
    worker.stop(5)
    worker.check()
    assert jobs.num_workers(config.name, config.lease_s) == 0


def test_a_planned_stop_gives_the_job_back(config, jobs):
    job = submit(config, jobs, prompt="slow", num_inference_steps=100)
    worker = make_worker(config, jobs)
    worker.start()
    wait_until(lambda: jobs.get(job.id, "").steps_done > 0)
    worker.stop(5)
    again = jobs.claim("next", config.name, 1.0, 1)
    assert (again.id, again.attempt) == (job.id, 1)


def test_a_fault_that_is_not_the_jobs_own_breaks_the_worker(config, jobs, monkeypatch):
    job = submit(config, jobs, prompt="a ball")
    worker = make_worker(config, jobs)
    monkeypatch.setattr(files, "write_files", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    worker.start()

    def is_broken():
        try:
            worker.check()
        except RuntimeError as error:
            return "disk is full" in str(error)
        return False

    wait_until(is_broken)
    assert jobs.get(job.id, "").status == Status.IN_PROGRESS
    monkeypatch.undo()
    next_worker = make_worker(config, jobs)
    wait_until(next_worker.run_one)
    done = jobs.get(job.id, "")
    assert (done.status, done.attempt) == (Status.COMPLETED, 2)


def test_an_attempt_without_end_breaks_the_worker(config, jobs):
    hasty = replace(config, attempt_timeout_s=0.1)
    job = submit(hasty, jobs, prompt="slow", num_inference_steps=100)
    worker = make_worker(hasty, jobs)
    worker.start()
    wait_until(lambda: worker._stopping.is_set())
    worker.stop(5)
    with pytest.raises(RuntimeError, match=r"attempt_timeout_s=0\.1"):
        worker.check()
    wait_until(lambda: jobs.claim("next", hasty.name, 1.0, 3) is not None)  # not given back: the lease runs out
    assert jobs.get(job.id, "").attempt == 2


def test_expired_jobs_are_swept_with_their_files(tmp_path, config):
    now_s = [time.time()]
    jobs = JobStore(f"sqlite:///{tmp_path}/other.sqlite", lambda: now_s[0])
    job = submit(config, jobs, prompt="a ball")
    assert make_worker(config, jobs).run_one()
    now_s[0] += config.keep_s + 1
    worker = make_worker(config, jobs)
    worker.start()
    wait_until(lambda: jobs.get(job.id, "") is None)
    worker.stop(5)
    assert not Path(config.storage, "videos", job.id).exists()
