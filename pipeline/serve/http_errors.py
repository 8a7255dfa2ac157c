"""One shape for every error that a client sees: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """An answer that is not what the client asked for.

    Attributes:
        status: HTTP status.
        code: for programs.
        param: the field at fault, or None.
        headers: added to the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer."""
        error = {"message": self.message, "type": self._type, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)

    @property
    def _type(self) -> str:
        by_status = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return by_status.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def invalid(errors: Sequence[Any], known: Sequence[str] = ()) -> ApiError:
    """pydantic's findings as one 400: the first field at fault is `param`, all are in the message.

    Args:
        errors: `ValidationError.errors()`.
        known: field names, to suggest the nearest for an unknown one.
    """
    messages = [_message(error, known) for error in errors]
    code = {"missing": "missing_field", "extra_forbidden": "unknown_field"}.get(errors[0]["type"], "invalid_value")
    return ApiError(400, code, "; ".join(messages), _field(errors[0]))


def _field(error: Any) -> str | None:
    names = [str(part) for part in error["loc"] if part not in ("body", "query", "header", "path")]
    return ".".join(names) or None


def _message(error: Any, known: Sequence[str]) -> str:
    field = _field(error)
    if error["type"] == "missing":
        return f"{field} is required"
    if error["type"] == "extra_forbidden":
        nearest = get_close_matches(str(field), known, n=1)
        return f"unknown field {str(field)[:100]!r}" + (f", did you mean {nearest[0]!r}?" if nearest else "")
    text = error["msg"].removeprefix("Value error, ")
    return f"{field}={str(error['input'])[:100]!r}: {text}" if field else text
