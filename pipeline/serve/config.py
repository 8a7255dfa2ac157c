"""What one serving app is given: the model, where results rest, and the limits a request must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline import store


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One served model.

    Attributes:
        model: model folder, any fsspec URL.
        storage: root URL of the finished files.
        database: SQLAlchemy URL of the job store. Empty: a SQLite file below `storage`, which must then be local and
            keeps the app on one machine; workers on several machines need a server such as PostgreSQL.
        generator: module that holds `Generator` (workers) and `read_limits` (HTTP processes).
        model_name: the name clients use; empty: the last part of `model`.
        num_workers: processes that generate, each with its own copy of the model.
        num_ingress: processes that answer HTTP.
        env_vars: environment of the app's processes: credentials of a bucket, PYTHONPATH of `generator`, ...
        cpus_per_worker, gpus_per_worker: what Ray reserves for a worker.
        lease_s: a worker silent for so long has lost its job.
        poll_s: pause of an idle worker between two looks into the store.
        attempt_timeout_s: an attempt that takes longer counts as hung, and its worker is restarted.
        max_attempts: workers that may die on one job before it fails.
        max_queue: waiting jobs; one more is refused with 429.
        keep_s: how long a finished job and its files are kept; 0 keeps them until they are deleted.
        height_px, width_px, seconds: what a request gets that does not say.
        num_steps, guidance_scale: likewise; None is the model's own.
        max_pixels_per_request: frames x rows x columns.
        max_steps: denoising steps of a request.
        max_prompt_chars: characters of a prompt.
        max_body_bytes: bytes of a request's body.
        api_keys: accepted bearer keys; each sees its own jobs only. Empty: no keys are asked for.
        allow_anonymous: serve beyond this machine without keys.
    """

    model: str
    storage: str
    database: str = ""
    generator: str = "video_dit.generator"
    model_name: str = ""
    num_workers: int = 1
    num_ingress: int = 1
    env_vars: Mapping[str, str] = field(default_factory=dict, repr=False)
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    lease_s: float = 30.0
    poll_s: float = 0.5
    attempt_timeout_s: float = 3600.0
    max_attempts: int = 3
    max_queue: int = 100
    keep_s: float = 7 * 24 * 3600.0
    height_px: int = 64
    width_px: int = 64
    seconds: float = 2.0
    num_steps: int | None = None
    guidance_scale: float | None = None
    max_pixels_per_request: int = 81 * 720 * 1280
    max_steps: int = 100
    max_prompt_chars: int = 4000
    max_body_bytes: int = 32 * 2**20
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_anonymous: bool = False

    def __post_init__(self) -> None:
        positive = (
            "num_workers num_ingress lease_s poll_s attempt_timeout_s max_attempts max_queue height_px width_px "
            "seconds max_pixels_per_request max_steps max_prompt_chars max_body_bytes"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0")
        for name in ("cpus_per_worker", "gpus_per_worker", "keep_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative")
        for name in ("model", "storage"):
            if not getattr(self, name):
                raise ValueError(f"{name}='' must be a folder URL")
        if self.num_steps is not None and not 0 < self.num_steps <= self.max_steps:
            raise ValueError(f"num_steps={self.num_steps} must be above 0 and not above max_steps={self.max_steps}")
        if self.guidance_scale is not None and not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale={self.guidance_scale!r} must not be negative")
        if any(not key for key in self.api_keys):
            raise ValueError("api_keys holds an empty key: every key must have at least one character")

    @property
    def name(self) -> str:
        """The name clients use for the model."""
        return self.model_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the job store.

        Raises:
            ValueError: no database is given and `storage` is not local.
        """
        if self.database:
            return self.database
        return f"sqlite:///{store.local_path(self.storage, 'SQLite below storage') / 'jobs.sqlite'}"
