"""The Ray Serve app: HTTP processes that take no GPU, and workers that take no HTTP."""

from __future__ import annotations

import dataclasses
import os
from importlib import import_module
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipeline import cluster, store
from pipeline.heap import keep_freed_memory
from pipeline.models import open_model
from pipeline.serve.api import Service, create_api
from pipeline.serve.config import ServeConfig
from pipeline.serve.http_errors import ApiError
from pipeline.serve.jobs import JobStore
from pipeline.serve.schemas import new_job
from pipeline.serve.worker import Worker

APP_NAME = "kinoray"
KEYS_VARIABLE = "KINORAY_API_KEYS"
STOP_S = 60.0  # a planned stop waits so long for the current denoising step
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Ingress:
    """Answers HTTP from the job store.

    Args:
        config: the app's.
        worker: not called; binding it here is what deploys the workers.
    """

    def __init__(self, config: ServeConfig, worker: DeploymentHandle) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._config
        limits = import_module(config.generator).read_limits(config.model)
        return create_api(Service(config=config, jobs=JobStore(config.database_url), limits=limits))


class VideoWorker:
    """Holds the model and a `Worker`; Serve restarts it when the worker breaks."""

    def __init__(self, config: ServeConfig) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        keep_freed_memory()
        generator = import_module(config.generator).Generator.from_pretrained(config.model, device=device)
        self._worker = Worker(config, JobStore(config.database_url), generator)
        self._worker.start()

    def check_health(self) -> None:
        """Raise if the worker broke."""
        self._worker.check()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # the model may have failed to load
            self._worker.stop(STOP_S)


def build_app(config: ServeConfig) -> serve.Application:
    """The app, ready for `serve.run`.

    Raises:
        ValueError: the default request cannot be made, or SQLite is asked for on remote storage.
    """
    config = dataclasses.replace(config, model=store.absolute(config.model), storage=store.absolute(config.storage))
    config = dataclasses.replace(config, database=config.database_url)
    _check_defaults(config)
    runtime_env = {"env_vars": dict(config.env_vars)} if config.env_vars else {}
    deploy_worker = serve.deployment(
        num_replicas=config.num_workers,
        ray_actor_options={
            "num_cpus": config.cpus_per_worker,
            "num_gpus": config.gpus_per_worker,
            "runtime_env": runtime_env,
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=STOP_S,
    )
    deploy_ingress = serve.deployment(
        name=Ingress.__name__,
        num_replicas=config.num_ingress,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": runtime_env},
        max_ongoing_requests=256,
    )
    return deploy_ingress(serve.ingress()(Ingress)).bind(config, deploy_worker(VideoWorker).bind(config))


def resolve(config: ServeConfig) -> ServeConfig:
    """Fill in what a person leaves out: a run stands for its model and its name, the environment has the keys."""
    model = open_model(config.model)
    keys = config.api_keys or tuple(filter(None, os.environ.get(KEYS_VARIABLE, "").split(",")))
    return dataclasses.replace(config, model=model.uri, model_name=config.model_name or model.name, api_keys=keys)


def app_from_args(args: dict[str, Any]) -> serve.Application:
    """`build_app` for a Serve config file: `args` are the fields of ServeConfig.

    Keys do not belong into such a file: they are read from the environment variable KINORAY_API_KEYS, with commas
    between them.
    """
    return build_app(resolve(ServeConfig(**args)))


def _check_defaults(config: ServeConfig) -> None:
    limits = import_module(config.generator).read_limits(config.model)
    try:
        new_job({"prompt": "any"}, "", None, config, limits)
    except ApiError as error:
        raise ValueError(f"a request that names only its prompt would be refused: {error.message}") from None


def serve_video(config: ServeConfig, host: str = "127.0.0.1", port: int = 8000, blocking: bool = True) -> None:
    """Serve on this cluster; with `blocking`, until interrupted.

    Raises:
        ValueError: `host` is reachable from other machines and no key protects the app.
    """
    if host not in LOOPBACK and not config.api_keys and not config.allow_anonymous:
        raise ValueError(f"host={host!r} is open to other machines: set api_keys, or allow_anonymous=True")
    app = build_app(config)
    cluster.connect()
    serve.start(http_options={"host": host, "port": port})
    serve.run(app, name=APP_NAME, route_prefix="/", blocking=blocking)
