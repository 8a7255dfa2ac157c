"""Serve a model over HTTP: POST /v1/videos, then GET /v1/videos/{id} and /v1/videos/{id}/content.

`--model` takes the folder of a training run or of a model. Keys that clients must send as bearer tokens come from the
environment: KINORAY_API_KEYS=key1,key2.
"""

import dataclasses
import sys
from typing import Annotated

import tyro

from jobs import cli
from pipeline import cluster, console, store
from pipeline.serve.app import resolve, serve_video
from pipeline.serve.config import ServeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the job.

    Attributes:
        serve: the model, where finished files go, a request's defaults and limits.
        host: address to listen on; beyond this machine only with keys or --allow-anonymous.
        port: to listen on.
    """

    serve: Annotated[ServeConfig, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"
    port: int = 8000


def job(options: Options) -> None:
    """Serve until interrupted."""
    storage = store.join(cluster.resolve_storage(options.serve.storage), "serve")
    config = resolve(dataclasses.replace(options.serve, storage=storage))
    console.say(f"serving {config.model_name} on http://{options.host}:{options.port}, files in {storage}; try:")
    console.say(
        f"  curl -s http://{options.host}:{options.port}/v1/videos -H 'content-type: application/json' "
        """-d '{"prompt": "a large red circle moves slowly to the right on a black background"}'"""
    )
    serve_video(config, options.host, options.port)


if __name__ == "__main__":
    default = ServeConfig(model=tyro.MISSING, storage="runs")
    arguments = tyro.cli(Options, default=Options(serve=default), args=sys.argv[1:], description=__doc__)
    with cli.errors_in_one_line():
        job(arguments)
