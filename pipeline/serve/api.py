"""The HTTP side: routes in the shape of OpenAI's videos API. Cheap and without state; all it knows is in the store."""

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from pipeline import __version__
from pipeline.serve import files, schemas
from pipeline.serve.bodies import read_fields
from pipeline.serve.config import ServeConfig
from pipeline.serve.database import Job, Status
from pipeline.serve.http_errors import ApiError, invalid
from pipeline.serve.jobs import IdempotencyConflictError, JobStore, QueueFullError
from video_dit.generator import Limits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes work with."""

    config: ServeConfig
    jobs: JobStore
    limits: Limits


def create_api(service: Service) -> FastAPI:
    """The ASGI app."""
    api = FastAPI(title="Kinoray", version=__version__, docs_url=None, redoc_url=None)
    api.state.service = service
    api.include_router(videos, prefix="/v1")
    api.include_router(health)
    api.middleware("http")(_frame)
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(RequestValidationError, _answer_invalid)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    return api


# What every route gets


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]


def _owner(service: ServiceDep, authorization: Annotated[str | None, Header()] = None) -> str:
    """Hash of the client's key: what its jobs are filed under."""
    keys = service.config.api_keys
    if not keys:
        return ""
    scheme, _, key = (authorization or "").partition(" ")
    digest = _digest(key.strip())
    known = [hmac.compare_digest(digest, _digest(each)) for each in keys]  # all of them, in constant time
    if scheme.lower() != "bearer" or not any(known):
        message = "send a valid key as 'Authorization: Bearer KEY'"
        raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
    return digest


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


OwnerDep = Annotated[str, Depends(_owner)]


async def _fields(request: Request, service: ServiceDep, owner: OwnerDep) -> dict[str, Any]:
    """The body's fields; `owner` stands first so that a stranger's body is not read."""
    return await read_fields(request, service.config.max_body_bytes)


FieldsDep = Annotated[dict[str, Any], Depends(_fields)]

_BODY_SCHEMA = {"schema": schemas.VideoCreate.model_json_schema()}
_BODY = {"content": {"application/json": _BODY_SCHEMA, "multipart/form-data": _BODY_SCHEMA}, "required": True}


# Routes. They are plain functions: FastAPI runs them in threads, so the store never holds up the event loop.

videos = APIRouter()
health = APIRouter()


@videos.post("/videos", openapi_extra={"requestBody": _BODY})
def create_video(
    service: ServiceDep,
    owner: OwnerDep,
    fields: FieldsDep,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> schemas.Video:
    """Queue a video. It is on disk when this answers."""
    new = schemas.new_job(fields, owner, idempotency_key, service.config, service.limits)
    try:
        job, is_new = service.jobs.submit(new, service.config.max_queue)
    except QueueFullError as error:
        raise ApiError(429, "queue_full", f"{error}: try again later", headers={"retry-after": "10"}) from None
    except IdempotencyConflictError as error:
        raise ApiError(422, "idempotency_key_reused", str(error), "Idempotency-Key") from None
    response.headers["openai-poll-after-ms"] = str(schemas.poll_after_ms(job))
    if not is_new:
        response.headers["idempotent-replayed"] = "true"
    return schemas.video(job)


@videos.get("/videos")
def list_videos(
    service: ServiceDep,
    owner: OwnerDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> schemas.VideoList:
    """The client's videos in the order of their creation."""
    try:
        jobs, has_more = service.jobs.page(owner, after, limit, newest_first=order == "desc")
    except KeyError:
        raise ApiError(400, "video_not_found", f"after={str(after)[:100]!r} is not a video", "after") from None
    data = [schemas.video(job) for job in jobs]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return schemas.VideoList(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@videos.get("/videos/{video_id}")
def get_video(service: ServiceDep, owner: OwnerDep, video_id: str, response: Response) -> schemas.Video:
    """One video's state."""
    job = _find(service, video_id, owner)
    response.headers["openai-poll-after-ms"] = str(schemas.poll_after_ms(job))
    return schemas.video(job)


@videos.get("/videos/{video_id}/content", response_class=StreamingResponse)
def get_content(
    service: ServiceDep,
    owner: OwnerDep,
    video_id: str,
    variant: files.Variant = files.Variant.VIDEO,
    range_: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """The bytes of a completed video, of its thumbnail or of its spritesheet; one byte range may be asked for."""
    job = _find(service, video_id, owner)
    if job.status != Status.COMPLETED:
        raise ApiError(404, "video_not_ready", f"{job.id} is {job.status}, its content exists once it is completed")
    file = files.StoredFile(**job.files[variant])
    etag = f'"{file.sha256}"'
    headers = {"accept-ranges": "bytes", "etag": etag, "cache-control": "private"}
    headers["content-disposition"] = f'inline; filename="{file.url.rsplit("/", 1)[-1]}"'
    try:
        part = files.parse_range(range_ if if_range in (None, etag) else None, file.size_bytes)
        opened = files.open_file(file)
    except ValueError as error:
        raise ApiError(
            416, "invalid_range", str(error), headers={"content-range": f"bytes */{file.size_bytes}"}
        ) from None
    except FileNotFoundError:
        raise ApiError(404, "video_expired", f"the files of {job.id} were removed") from None
    start, stop = part or (0, file.size_bytes)
    headers["content-length"] = str(stop - start)
    if part:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{file.size_bytes}"
    chunks = files.read_chunks(opened, start, stop)
    return StreamingResponse(chunks, 206 if part else 200, headers, media_type=file.content_type)


@videos.delete("/videos/{video_id}")
def delete_video(service: ServiceDep, owner: OwnerDep, video_id: str) -> schemas.VideoDeleted:
    """Forget a video and its files; one that runs stops after its current denoising step."""
    job = service.jobs.delete(video_id, owner)
    if job is None:
        raise _not_found(video_id)
    if job.files:  # else its worker may still write there: it cleans up after itself, or the sweep does
        files.remove(files.job_folder(service.config.storage, job.id))
    return schemas.VideoDeleted(id=job.id)


@videos.get("/models")
def list_models(service: ServiceDep, owner: OwnerDep) -> dict[str, Any]:
    """The one model served here and what it can make."""
    config, limits = service.config, service.limits
    capabilities = {
        "fps": limits.fps,
        "stride": limits.stride._asdict(),
        "default_size": f"{config.width_px}x{config.height_px}",
        "default_seconds": f"{config.seconds:g}",
        "max_pixels": config.max_pixels_per_request,
        "max_inference_steps": config.max_steps,
    }
    model = {"id": config.name, "object": "model", "created": 0, "owned_by": "kinoray", "capabilities": capabilities}
    return {"object": "list", "data": [model]}


@health.get("/healthz")
def get_health(service: ServiceDep) -> dict[str, Any]:
    """200 while the store answers and a worker lives; no key is needed."""
    num_workers = service.jobs.num_workers(service.config.name, within_s=service.config.lease_s)
    if not num_workers:
        message = f"no worker gave a sign of life in the last {service.config.lease_s:g} s; jobs wait"
        raise ApiError(503, "no_worker", message)
    return {"status": "ok", "num_workers": num_workers, "num_queued": service.jobs.num_queued(service.config.name)}


def _find(service: Service, video_id: str, owner: str) -> Job:
    job = service.jobs.get(video_id, owner)
    if job is None:
        raise _not_found(video_id)
    return job


def _not_found(video_id: str) -> ApiError:
    return ApiError(404, "video_not_found", f"no video {video_id[:100]!r}", "video_id")


# Around every route


async def _frame(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Let no fault out that is not in the one error shape. Ray Serve names the request, in and out."""
    request_id = request.headers.get("x-request-id", "without a name")
    try:
        response = await call_next(request)
    except SQLAlchemyError:
        logger.exception("request %s: the job store failed", request_id)
        response = ApiError(
            503, "store_unavailable", "the job store does not answer", headers={"retry-after": "5"}
        ).response()
    except Exception:
        logger.exception("request %s failed", request_id)
        response = ApiError(500, "internal_error", f"the server failed; its log has request {request_id}").response()
    response.headers["x-content-type-options"] = "nosniff"
    return response


def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors()).response()


def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return ApiError(error.status_code, code, str(error.detail), headers=error.headers).response()
