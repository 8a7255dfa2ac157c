"""Connecting to Ray: the cluster this job was submitted to, a running one, or a local one made for this process."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import ray

from pipeline import store


def connect(**init_options: Any) -> None:
    """Join the Ray cluster (RAY_ADDRESS, or one running on this machine), or start a local one.

    Args:
        init_options: passed to `ray.init`.
    """
    if ray.is_initialized():
        return
    init_options.setdefault("log_to_driver", False)  # errors are raised here; the rest is in the session's logs
    ray.init(logging_level=logging.WARNING, **init_options)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # the same rows in the same order give the same shards
    context.enable_progress_bars = sys.stderr.isatty()
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)


def resolve_storage(url: str) -> str:
    """The storage root as an absolute URL.

    A submitted job runs in a temporary copy of the working directory, which Ray deletes: there a relative path means
    one below the home folder of the machine that runs the job.
    """
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and "://" not in url and not Path(url).expanduser().is_absolute():
        return str(Path.home() / "kinoray" / url)
    return store.absolute(url)


def num_cpus() -> int:
    """CPUs of the cluster."""
    connect()
    return int(ray.cluster_resources()["CPU"])
