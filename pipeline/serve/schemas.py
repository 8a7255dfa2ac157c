"""The bodies on the wire, and how they become jobs and jobs become them."""

from __future__ import annotations

import math
import re
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.request_files import from_json, no_files, to_json
from pipeline.serve.config import ServeConfig
from pipeline.serve.database import Job, NewJob, Status
from pipeline.serve.http_errors import ApiError, invalid
from pipeline.store import content_hash
from video_dit.generator import GenerationRequest, Limits

Side = Annotated[int, Field(ge=1, le=16384)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class VideoCreate(BaseModel):
    """Body of POST /v1/videos. Form fields arrive as text and are read as numbers; what is left out has a default."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    seconds: Annotated[Finite | None, Field(gt=0, le=3600)] = None
    size: Annotated[str | None, Field(pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", description="WIDTHxHEIGHT")] = None
    width: Side | None = None
    height: Side | None = None
    num_frames: Annotated[int | None, Field(ge=1, le=100_000)] = None
    fps: Annotated[Finite | None, Field(ge=1, le=240, description="of the file; default: the model's")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    num_inference_steps: Annotated[int | None, Field(ge=1)] = None
    guidance_scale: Annotated[Finite | None, Field(ge=0, le=100)] = None
    negative_prompt: str = ""

    @model_validator(mode="after")
    def _one_way_each(self) -> VideoCreate:
        if self.size is not None and (self.width is not None or self.height is not None):
            raise ValueError("give size, or width and height, not both")
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together")
        if self.seconds is not None and self.num_frames is not None:
            raise ValueError("give seconds or num_frames, not both")
        return self


class VideoError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """The video object."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    prompt: str
    error: VideoError | None
    seed: int
    num_frames: int
    fps: float
    steps_done: int
    steps_total: int
    queue_position: int | None
    attempt: int


class VideoList(BaseModel):
    """One page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """Answer to DELETE."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def video(job: Job) -> Video:
    """What a client sees of a job."""
    request = from_json(job.request, no_files)
    done = job.status == Status.COMPLETED
    failed = VideoError(code=job.error_code or "", message=job.error_message or "")
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        # 100 is kept for a video that can be fetched: decoding and writing follow the last step.
        progress=100 if done else min(99, 100 * job.steps_done // max(1, job.steps_total)),
        created_at=int(job.created_at_s),
        completed_at=None if job.completed_at_s is None else int(job.completed_at_s),
        expires_at=None if job.expires_at_s is None else int(job.expires_at_s),
        seconds=job.seconds,
        size=f"{request.width_px}x{request.height_px}",
        prompt=request.prompt,
        error=failed if job.status == Status.FAILED else None,
        seed=request.seed,
        num_frames=request.num_frames,
        fps=job.fps,
        steps_done=job.steps_done,
        steps_total=job.steps_total,
        queue_position=job.queue_position,
        attempt=job.attempt,
    )


def poll_after_ms(job: Job) -> int:
    """When to ask again: a quarter of the time that the remaining steps will take, between 250 and 5000 ms."""
    if job.status != Status.IN_PROGRESS or not job.steps_done or job.started_at_s is None:
        return 1000
    step_s = (time.time() - job.started_at_s) / job.steps_done
    return int(min(5000, max(250, 250 * step_s * (job.steps_total - job.steps_done))))


def new_job(
    fields: dict[str, Any], owner: str, idempotency_key: str | None, config: ServeConfig, limits: Limits
) -> NewJob:
    """The job that a body asks for, all defaults and the seed filled in.

    Raises:
        ApiError: 400 that names the field, its value and the rule.
    """
    body = _parse(fields)
    _check_body(body, config)
    fps = body.fps or limits.fps
    request = _request(body, config, limits, fps)
    seconds = f"{request.num_frames / fps if body.seconds is None else body.seconds:g}"
    return NewJob(
        owner=owner,
        idempotency_key=idempotency_key,
        body_hash=content_hash(fields, length=64),
        model=config.name,
        request=to_json(request)[0],
        seconds=seconds,
        fps=fps,
        steps_total=request.num_steps or 0,
    )


def _parse(fields: dict[str, Any]) -> VideoCreate:
    try:
        return VideoCreate.model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors(), list(VideoCreate.model_fields)) from None


def _request(body: VideoCreate, config: ServeConfig, limits: Limits, fps: float) -> GenerationRequest:
    height_px, width_px = _sides(body, config)
    try:
        request = GenerationRequest(
            prompt=body.prompt,
            height_px=height_px,
            width_px=width_px,
            num_frames=_num_frames(body, config, limits, fps),
            num_steps=body.num_inference_steps or config.num_steps,
            guidance_scale=config.guidance_scale if body.guidance_scale is None else body.guidance_scale,
            negative_prompt=body.negative_prompt,
            seed=secrets.randbits(32) if body.seed is None else body.seed,
        )
        request = limits.complete(request)
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), _param(str(error), body)) from None
    _check_request(request, body, config)
    return request


def _check_body(body: VideoCreate, config: ServeConfig) -> None:
    if body.model not in (None, "", config.name):
        raise ApiError(400, "model_not_found", f"model={body.model!r}: this server runs {config.name!r}", "model")
    for name in ("prompt", "negative_prompt"):
        num_chars = len(getattr(body, name))
        if num_chars > config.max_prompt_chars:
            message = f"{name} has {num_chars} characters, at most {config.max_prompt_chars} are allowed"
            raise ApiError(400, "invalid_value", message, name)
    if (body.num_inference_steps or 0) > config.max_steps:
        message = f"num_inference_steps={body.num_inference_steps}: at most {config.max_steps} are allowed"
        raise ApiError(400, "invalid_value", message, "num_inference_steps")


def _check_request(request: GenerationRequest, body: VideoCreate, config: ServeConfig) -> None:
    num_frames, height_px, width_px = request.shape
    num_pixels = num_frames * height_px * width_px
    if num_pixels > config.max_pixels_per_request:
        message = (
            f"{num_frames} frames of {width_px}x{height_px} are {num_pixels} pixels, at most "
            f"{config.max_pixels_per_request} are allowed: ask for fewer frames or a smaller size"
        )
        raise ApiError(400, "too_many_pixels", message, _param("height_px=", body))
    if height_px % 2 or width_px % 2:
        message = f"size={width_px}x{height_px}: both sides must be even"
        raise ApiError(400, "invalid_value", message, _param("height_px=", body))


def _sides(body: VideoCreate, config: ServeConfig) -> tuple[int, int]:
    if body.size is not None:
        width_px, height_px = map(int, body.size.split("x"))
        return height_px, width_px
    return body.height or config.height_px, body.width or config.width_px


def _num_frames(body: VideoCreate, config: ServeConfig, limits: Limits, fps: float) -> int:
    """The count 1 + k strides nearest to the duration; of two, the longer."""
    if body.num_frames is not None:
        return body.num_frames
    wanted = (body.seconds or config.seconds) * fps
    return 1 + limits.stride.t * max(0, math.floor((wanted - 1) / limits.stride.t + 0.5))


def _param(message: str, body: VideoCreate) -> str | None:
    """The client's name of the field that a ValueError of the model names first."""
    match = re.search(r"\b(height_px|width_px|num_frames|num_steps|guidance_scale|seed|prompt)=", message)
    if match is None:
        return None
    of_size = "size" if body.size is not None or body.width is None else match[1].removesuffix("_px")
    of_time = "num_frames" if body.seconds is None else "seconds"
    names = {"height_px": of_size, "width_px": of_size, "num_frames": of_time, "num_steps": "num_inference_steps"}
    return names.get(match[1], match[1])
