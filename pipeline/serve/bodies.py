"""Reading a request's body, JSON or form, into plain fields under a limit of bytes and parts."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from pipeline.serve.http_errors import ApiError

MAX_FORM_PARTS = 64


async def read_fields(request: Request, max_bytes: int) -> dict[str, Any]:
    """The fields of a JSON or form body; a form's values are text.

    Raises:
        ApiError: 400, 413 or 415: the body is malformed, too large, of an unknown kind, or brings a file.
    """
    body = await _read(request, max_bytes)
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind == "application/json":
        fields = _parse_json(body)
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        fields = await _parse_form(request, body)
    else:
        raise ApiError(415, "unsupported_media_type", f"content-type {kind[:100]!r}: send JSON or multipart/form-data")
    if "input_reference" in fields or any(isinstance(value, UploadFile) for value in fields.values()):
        message = "this model makes videos from text only: leave input_reference and files out"
        raise ApiError(400, "unsupported_field", message, "input_reference")
    return fields


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, "body_too_large", f"the body has more than {max_bytes} bytes")
    return bytes(body)


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "invalid_json", f"the body is a JSON {type(fields).__name__}, it must be an object")
    return fields


async def _parse_form(request: Request, body: bytes) -> dict[str, Any]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    form = await Request(request.scope, replay).form(max_files=MAX_FORM_PARTS, max_fields=MAX_FORM_PARTS)
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise ApiError(400, "duplicate_field", f"{name[:100]!r} is given twice", name[:100])
        fields[name] = value
    return fields
