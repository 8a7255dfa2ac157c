"""The job store's database: tables, one row as a value, and the engine with its durability settings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.engine import make_url


class Status(StrEnum):
    """queued -> in_progress -> completed | failed; the last two never change."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


class ErrorCode(StrEnum):
    """Why a job failed."""

    CANCELLED = "cancelled"
    INVALID_INPUT = "invalid_input"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_LOST = "worker_lost"
    INTERNAL = "internal"


METADATA = MetaData()

JOBS = Table(
    "jobs",
    METADATA,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("idempotency_key", String(255)),
    Column("body_hash", String(64), nullable=False),
    Column("model", String(255), nullable=False),
    Column("request", JSON, nullable=False),
    Column("seconds", String(32), nullable=False),
    Column("fps", Float, nullable=False),
    Column("status", String(16), nullable=False),
    Column("error_code", String(32)),
    Column("error_message", Text),
    Column("attempt", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("worker", String(255)),
    Column("lease_until_s", Float(53), nullable=False),
    Column("steps_done", Integer, nullable=False),
    Column("steps_total", Integer, nullable=False),
    Column("created_at_s", Float(53), nullable=False),
    Column("started_at_s", Float(53)),
    Column("completed_at_s", Float(53)),
    Column("expires_at_s", Float(53)),
    Column("deleted", Boolean, nullable=False),
    Column("files", JSON, nullable=False),
    UniqueConstraint("owner", "idempotency_key"),
    Index("jobs_by_status", "status", "sequence"),
    Index("jobs_by_owner", "owner", "sequence"),
    Index("jobs_by_expiry", "expires_at_s"),
    sqlite_autoincrement=True,  # a removed job's place in the order is not given out again
)

WORKERS = Table(
    "workers",
    METADATA,
    Column("worker", String(255), primary_key=True),
    Column("model", String(255), nullable=False),
    Column("seen_at_s", Float(53), nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What is known of a job when it is accepted.

    Attributes:
        owner: hash of the client's key; "" where keys are not asked for.
        idempotency_key: the client's name for this call, or None.
        body_hash: hash of the call's fields.
        model: name of the model that is to run it.
        request: fields of a `GenerationRequest`, the seed included, so that every attempt gives the same video.
        seconds: duration as the client reads it.
        fps: frames per second of the file.
        steps_total: denoising steps.
    """

    owner: str
    idempotency_key: str | None
    body_hash: str
    model: str
    request: dict[str, Any]
    seconds: str
    fps: float
    steps_total: int


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """One row of the store; times are seconds since 1970.

    Attributes:
        sequence: place in the order of arrival.
        attempt: workers that took it, planned stops not counted.
        fence: number of the claim; a write with an older one is refused.
        files: by variant, a `StoredFile` as a dict; empty while not completed.
        queue_position: waiting jobs of the same model before this one; None when it does not wait.
    """

    sequence: int
    id: str
    status: Status
    error_code: str | None
    error_message: str | None
    attempt: int
    fence: int
    worker: str | None
    lease_until_s: float
    steps_done: int
    created_at_s: float
    started_at_s: float | None
    completed_at_s: float | None
    expires_at_s: float | None
    deleted: bool
    files: dict[str, dict[str, Any]]
    queue_position: int | None


def open_engine(url: str) -> Engine:
    """Connections to the database. SQLite is set to survive a power cut (WAL, synchronous FULL).

    Raises:
        ValueError: a SQLite database that is not a file.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True)
    if parsed.database in (None, "", ":memory:"):
        raise ValueError(f"database={url!r} must name a file: workers are other processes")
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": 30})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions later than `_begin_sqlite`
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads and then writes must lock first: SQLite refuses to upgrade a stale reader.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
