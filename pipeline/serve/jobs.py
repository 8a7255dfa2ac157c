"""The durable queue: every accepted job is a row, and every step of its life is one transaction.

A worker claims a job under a lease and gets a fence, the number of the claim. All its later writes carry the fence, so
a worker that was silent beyond its lease, and whose job another one took, can change nothing. SQLite (one machine) or
any server that SQLAlchemy knows.
"""

from __future__ import annotations

import base64
import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    case,
    delete,
    extract,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from pipeline.errors import KinorayError
from pipeline.serve.database import JOBS, METADATA, WORKERS, ErrorCode, Job, NewJob, Status, open_engine

TOMBSTONE_S = 3600.0  # a deleted row outlives every worker that may still write files for it


class LeaseLostError(KinorayError):
    """The job was deleted, or belongs to another worker now: stop, and write nothing more."""


class QueueFullError(KinorayError):
    """As many jobs wait as may wait."""


class IdempotencyConflictError(KinorayError):
    """The idempotency key was used before, with another body."""


class JobStore:
    """Jobs in a database. Safe to use from many threads and processes at once.

    Args:
        url: SQLAlchemy URL.
        clock: seconds since 1970. PostgreSQL's own clock is used instead, so that machines need not agree.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._engine = open_engine(url)
        self._reader = self._engine.execution_options(read_only=True)
        self._clock = clock
        with self._engine.begin() as connection:
            METADATA.create_all(connection)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    # What clients do

    def submit(self, new: NewJob, max_queue: int) -> tuple[Job, bool]:
        """Queue a job, or find the one that the same call queued before; on disk when this returns.

        Returns:
            the job, and whether it is new.

        Raises:
            QueueFullError: `max_queue` jobs of this model wait.
            IdempotencyConflictError: the key came before with another body.
        """
        try:
            with self._engine.begin() as connection:
                return self._submit(connection, new, max_queue)
        except IntegrityError:  # the same key was committed between our look and our insert
            with self._engine.begin() as connection:
                return self._submit(connection, new, max_queue)

    def _submit(self, connection: Connection, new: NewJob, max_queue: int) -> tuple[Job, bool]:
        if new.idempotency_key is not None:
            same_key = and_(JOBS.c.owner == new.owner, JOBS.c.idempotency_key == new.idempotency_key)
            before = connection.execute(_jobs().where(same_key)).one_or_none()
            if before is not None:
                if before.body_hash != new.body_hash:
                    raise IdempotencyConflictError(f"idempotency key {new.idempotency_key!r} came with another body")
                return _job(before), False
        if self._num_queued(connection, new.model) >= max_queue:
            raise QueueFullError(f"{max_queue} jobs wait already")
        start = {"status": Status.QUEUED, "attempt": 0, "fence": 0, "lease_until_s": 0.0, "steps_done": 0}
        row = {**dataclasses.asdict(new), **start, "deleted": False, "files": {}}
        job_id = new_id()
        connection.execute(insert(JOBS).values(**row, id=job_id, created_at_s=self._now_s(connection)))
        return _job(connection.execute(_jobs().where(JOBS.c.id == job_id)).one()), True

    def get(self, job_id: str, owner: str) -> Job | None:
        """The owner's job, or None."""
        with self._reader.begin() as connection:
            row = connection.execute(_jobs().where(_visible(owner), JOBS.c.id == job_id)).one_or_none()
        return None if row is None else _job(row)

    def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """Up to `limit` of the owner's jobs that follow job `after`, and whether more follow.

        Raises:
            KeyError: the owner has no job `after`.
        """
        order = JOBS.c.sequence.desc() if newest_first else JOBS.c.sequence.asc()
        query = _jobs().where(_visible(owner)).order_by(order).limit(limit + 1)
        with self._reader.begin() as connection:
            if after is not None:  # a deleted job still marks its place
                place = select(JOBS.c.sequence).where(JOBS.c.owner == owner, JOBS.c.id == after)
                sequence = connection.scalar(place)
                if sequence is None:
                    raise KeyError(after)
                query = query.where(JOBS.c.sequence < sequence if newest_first else JOBS.c.sequence > sequence)
            rows = connection.execute(query).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, job_id: str, owner: str) -> Job | None:
        """Hide the owner's job and cancel it if it waits or runs; returns it as it was, or None.

        The row stays as a tombstone until `expired` gives it out: a worker learns of the end from it, and files that
        a dying worker leaves behind are still found.
        """
        with self._engine.begin() as connection:
            row = connection.execute(_jobs().where(_visible(owner), JOBS.c.id == job_id)).one_or_none()
            if row is None:
                return None
            now_s = self._now_s(connection)
            ended = (
                {}
                if row.status in (Status.COMPLETED, Status.FAILED)
                else _failed(now_s, ErrorCode.CANCELLED, "deleted by its owner")
            )
            values = {**ended, "deleted": True, "idempotency_key": None, "expires_at_s": now_s + TOMBSTONE_S}
            connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(**values))
            return _job(row)

    def num_queued(self, model: str) -> int:
        """Jobs of the model that wait."""
        with self._reader.begin() as connection:
            return self._num_queued(connection, model)

    def num_workers(self, model: str, within_s: float) -> int:
        """Workers of the model that gave a sign of life in the last `within_s` seconds."""
        with self._reader.begin() as connection:
            since_s = self._now_s(connection) - within_s
            fresh = and_(WORKERS.c.model == model, WORKERS.c.seen_at_s >= since_s)
            return connection.execute(select(func.count()).select_from(WORKERS).where(fresh)).scalar_one()

    # What workers do

    def claim(self, worker: str, model: str, lease_s: float, max_attempts: int) -> Job | None:
        """Take the oldest job of the model that waits or whose lease ran out, or None.

        A job that already had `max_attempts` attempts fails here with `worker_lost`.
        """
        while True:
            with self._engine.begin() as connection:
                now_s = self._now_s(connection)
                lapsed = and_(JOBS.c.status == Status.IN_PROGRESS, JOBS.c.lease_until_s < now_s)
                free = and_(JOBS.c.model == model, or_(JOBS.c.status == Status.QUEUED, lapsed))
                row = connection.execute(_jobs().where(free).order_by(JOBS.c.sequence).limit(1)).one_or_none()
                if row is None:
                    return None
                lost = row.attempt >= max_attempts
                if lost:
                    message = f"{row.attempt} workers were lost while they made this video"
                    values = _failed(now_s, ErrorCode.WORKER_LOST, message)
                else:
                    values = {"status": Status.IN_PROGRESS, "attempt": row.attempt + 1, "worker": worker}
                    values |= {"steps_done": 0, "started_at_s": now_s, "lease_until_s": now_s + lease_s}
                values["fence"] = row.fence + 1
                # Where the database lets two readers see the same row, the fence lets one of them through.
                mine = and_(JOBS.c.id == row.id, JOBS.c.fence == row.fence, JOBS.c.status == row.status)
                taken = connection.execute(update(JOBS).where(mine).values(**values)).rowcount
                if taken and not lost:
                    return _job(connection.execute(_jobs().where(JOBS.c.id == row.id)).one())

    def progress(self, job: Job, steps_done: int, steps_total: int, lease_s: float) -> None:
        """Record denoising steps and extend the lease.

        Raises:
            LeaseLostError: the claim is no longer valid (so for every method that takes a claimed job).
        """
        done = {"steps_done": steps_done, "steps_total": steps_total}
        self._write(job, lambda now_s: {**done, "lease_until_s": now_s + lease_s})

    def extend(self, job: Job, lease_s: float) -> None:
        """Extend the lease."""
        self._write(job, lambda now_s: {"lease_until_s": now_s + lease_s})

    def check(self, job: Job) -> None:
        """Raise if the claim is no longer valid; reads only."""
        with self._reader.begin() as connection:
            if connection.execute(select(JOBS.c.id).where(_held(job))).one_or_none() is None:
                raise LeaseLostError(f"{job.id} is no longer held with fence {job.fence}")

    def release(self, job: Job) -> None:
        """Give a job back unfinished: the next claim takes it at once, and this attempt does not count."""
        self._write(job, lambda now_s: {"lease_until_s": 0.0, "attempt": job.attempt - 1})

    def complete(self, job: Job, files: Mapping[str, Any], keep_s: float) -> None:
        """The job's files are whole: it is completed. It expires after `keep_s` seconds; 0 means never."""
        done = {"status": Status.COMPLETED, "files": dict(files), "steps_done": JOBS.c.steps_total}
        self._write(job, lambda now_s: {**done, "completed_at_s": now_s, "expires_at_s": _expiry(now_s, keep_s)})

    def fail(self, job: Job, code: ErrorCode, message: str, keep_s: float) -> None:
        """The job cannot be done."""
        self._write(job, lambda now_s: _failed(now_s, code, message) | {"expires_at_s": _expiry(now_s, keep_s)})

    def beat(self, worker: str, model: str, forget_s: float) -> None:
        """Record a sign of life; workers silent for `forget_s` are forgotten."""
        with self._engine.begin() as connection:
            now_s = self._now_s(connection)
            old = or_(WORKERS.c.worker == worker, WORKERS.c.seen_at_s < now_s - forget_s)
            connection.execute(delete(WORKERS).where(old))
            connection.execute(insert(WORKERS).values(worker=worker, model=model, seen_at_s=now_s))

    def leave(self, worker: str) -> None:
        """The worker stops as planned: it is no longer counted."""
        with self._engine.begin() as connection:
            connection.execute(delete(WORKERS).where(WORKERS.c.worker == worker))

    def expired(self, limit: int) -> list[str]:
        """Ids of jobs whose time is over: remove their files, then `forget` them."""
        with self._reader.begin() as connection:
            over = select(JOBS.c.id).where(JOBS.c.expires_at_s < self._now_s(connection)).limit(limit)
            return list(connection.scalars(over))

    def forget(self, job_id: str) -> None:
        """Remove a row."""
        with self._engine.begin() as connection:
            connection.execute(delete(JOBS).where(JOBS.c.id == job_id))

    def _write(self, job: Job, values: Callable[[float], dict[str, Any]]) -> None:
        with self._engine.begin() as connection:
            change = update(JOBS).where(_held(job)).values(**values(self._now_s(connection)))
            if not connection.execute(change).rowcount:
                raise LeaseLostError(f"{job.id} is no longer held with fence {job.fence}")

    def _num_queued(self, connection: Connection, model: str) -> int:
        waiting = and_(JOBS.c.model == model, JOBS.c.status == Status.QUEUED)
        return connection.execute(select(func.count()).select_from(JOBS).where(waiting)).scalar_one()

    def _now_s(self, connection: Connection) -> float:
        if connection.dialect.name == "postgresql":
            return float(connection.execute(select(extract("epoch", func.clock_timestamp()))).scalar_one())
        return self._clock()


def new_id() -> str:
    """`video_` and 128 random bits in base 32."""
    return "video_" + base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


def _jobs() -> Select[Any]:
    before = JOBS.alias()
    earlier = and_(
        before.c.status == Status.QUEUED, before.c.model == JOBS.c.model, before.c.sequence < JOBS.c.sequence
    )
    position = select(func.count()).select_from(before).where(earlier).correlate(JOBS).scalar_subquery()
    return select(JOBS, case((JOBS.c.status == Status.QUEUED, position)).label("queue_position"))


def _job(row: Row[Any]) -> Job:
    return Job(**{**row._mapping, "status": Status(row.status)})


def _visible(owner: str) -> ColumnElement[bool]:
    return and_(JOBS.c.owner == owner, JOBS.c.deleted.is_(False))


def _held(job: Job) -> ColumnElement[bool]:
    return and_(JOBS.c.id == job.id, JOBS.c.fence == job.fence, JOBS.c.status == Status.IN_PROGRESS)


def _expiry(now_s: float, keep_s: float) -> float | None:
    return now_s + keep_s if keep_s else None


def _failed(now_s: float, code: ErrorCode, message: str) -> dict[str, Any]:
    return {"status": Status.FAILED, "error_code": code, "error_message": message, "completed_at_s": now_s}
