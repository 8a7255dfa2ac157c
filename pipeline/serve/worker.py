"""The side that makes videos: one thread runs jobs, another keeps the lease and says that the worker lives.

Nothing here reports to a client: all a worker knows goes into the job store. Any fault that is not one job's own ends
the worker, loudly; its job's lease lapses and another worker, or this one restarted, takes it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch
from sqlalchemy.exc import SQLAlchemyError

from pipeline import __version__
from pipeline.request_files import from_json, no_files
from pipeline.serve import files
from pipeline.serve.config import ServeConfig
from pipeline.serve.database import ErrorCode, Job
from pipeline.serve.jobs import JobStore, LeaseLostError
from video_dit.generator import Generator

PROGRESS_PERIOD_S = 0.5  # between two writes of progress; a cancelled job is noticed at every step
SWEEP_PERIOD_S = 60.0
SWEEP_LIMIT = 100

logger = logging.getLogger(__name__)


class WorkerStoppingError(Exception):
    """The worker was asked to stop in the middle of a job."""


class Worker:
    """Runs jobs of one model until it is stopped or breaks.

    Args:
        config: the app's.
        jobs: the store.
        generator: the loaded model.
    """

    def __init__(self, config: ServeConfig, jobs: JobStore, generator: Generator) -> None:
        self._config, self._jobs, self._generator = config, jobs, generator
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._stopping = threading.Event()
        self._current: Job | None = None
        self._error: BaseException | None = None
        self._swept_at_s = -SWEEP_PERIOD_S
        self._threads = [
            threading.Thread(target=self._guard, args=(target,), name=target.__name__, daemon=True)
            for target in (self._run_jobs, self._keep_alive)
        ]

    def start(self) -> None:
        """Begin to take jobs."""
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raise RuntimeError if the worker broke."""
        if self._error is not None:
            raise RuntimeError(f"worker {self.name} broke: {self._error!r}") from self._error
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        if dead and not self._stopping.is_set():
            raise RuntimeError(f"worker {self.name} lost its threads {dead}")

    def stop(self, timeout_s: float) -> None:
        """Take no more jobs, give the running one back after its current step, and wait for that."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout_s)
        self._jobs.leave(self.name)

    def run_one(self) -> bool:
        """Take a job and bring it to its end; False if none waits."""
        config = self._config
        job = self._jobs.claim(self.name, config.name, config.lease_s, config.max_attempts)
        if job is None:
            return False
        self._current = job
        logger.info("%s: attempt %d by %s", job.id, job.attempt, self.name)
        try:
            self._run(job)
        except LeaseLostError as error:  # deleted by its owner, or taken by another worker: both are in order
            logger.info("%s; its attempt %d ends", error, job.attempt)
        except WorkerStoppingError:
            if self._error is None:  # a planned stop is no failed attempt; a breakdown is, and the lease runs out
                self._jobs.release(job)
        finally:
            self._current = None
        return True

    def _run(self, job: Job) -> None:
        video = self._generate(job)
        if video is None:
            return
        folder, name = files.job_folder(self._config.storage, job.id), f"{job.id}.{job.fence}"
        metadata = {"id": job.id, "model": self._config.model, "request": job.request, "fps": job.fps}
        metadata |= {"attempt": job.attempt, "fence": job.fence, "worker": self.name, "code_version": __version__}
        written = files.write_files(folder, name, video.numpy(), job.fps, metadata)
        try:
            self._jobs.complete(job, written, self._config.keep_s)
        except LeaseLostError:
            files.remove_claim(folder, name)
            raise
        files.remove_other_claims(folder, name)

    def _generate(self, job: Job) -> torch.Tensor | None:
        """The video, uint8 t h w 3, or None if the job failed by its own fault."""
        try:
            return self._generator([from_json(job.request, no_files)], on_step=self._on_step(job))[0]
        except (LeaseLostError, WorkerStoppingError, SQLAlchemyError, torch.AcceleratorError):
            raise  # not the job's fault; after an accelerator's error the whole process is of no more use
        except ValueError as error:
            code, message = ErrorCode.INVALID_INPUT, str(error)
        except (torch.OutOfMemoryError, MemoryError):
            code, message = ErrorCode.OUT_OF_MEMORY, "not enough memory: ask for fewer frames or a smaller size"
        except Exception as error:
            logger.exception("%s failed", job.id)
            code, message = ErrorCode.INTERNAL, f"{type(error).__name__} in the model; the server's log has the details"
        self._jobs.fail(job, code, message, self._config.keep_s)
        return None

    def _on_step(self, job: Job) -> Callable[[int, int], None]:
        written_at_s = time.monotonic()

        def on_step(num_done: int, num_total: int) -> None:
            nonlocal written_at_s
            if self._stopping.is_set():
                raise WorkerStoppingError
            if num_done < num_total and time.monotonic() - written_at_s < PROGRESS_PERIOD_S:
                self._jobs.check(job)
                return
            self._jobs.progress(job, num_done, num_total, self._config.lease_s)
            written_at_s = time.monotonic()

        return on_step

    def _run_jobs(self) -> None:
        while not self._stopping.is_set():
            self._sweep()
            if not self.run_one():
                self._stopping.wait(self._config.poll_s)

    def _keep_alive(self) -> None:
        """Keep the lease where one step, the decoder or the file takes longer than it lasts."""
        config = self._config
        held, since_s = None, 0.0
        while not self._stopping.is_set():
            self._jobs.beat(self.name, config.name, forget_s=10 * config.lease_s)
            job = self._current
            if job is not held:
                held, since_s = job, time.monotonic()
            if job is not None:
                if time.monotonic() - since_s > config.attempt_timeout_s:
                    raise TimeoutError(f"{job.id} runs longer than attempt_timeout_s={config.attempt_timeout_s}")
                self._extend(job)
            self._stopping.wait(config.lease_s / 3)

    def _extend(self, job: Job) -> None:
        try:
            self._jobs.extend(job, self._config.lease_s)
        except LeaseLostError:
            logger.info("%s has ended, was deleted or is another worker's: its lease is not extended", job.id)

    def _sweep(self) -> None:
        """Remove what has expired, and what deleted jobs left behind."""
        if time.monotonic() - self._swept_at_s < SWEEP_PERIOD_S:
            return
        self._swept_at_s = time.monotonic()
        for job_id in self._jobs.expired(SWEEP_LIMIT):
            files.remove(files.job_folder(self._config.storage, job_id))
            self._jobs.forget(job_id)

    def _guard(self, target: Callable[[], Any]) -> None:
        try:
            target()
        except BaseException as error:
            logger.exception("worker %s breaks", self.name)
            self._error = error
            self._stopping.set()
