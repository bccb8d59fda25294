"""Everything that goes wrong is told in one shape, OpenAI's: ``{"error": {"message", "type", "param", "code"}}``."""

import json
import logging
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mini_infer.exceptions import (
    ContextLengthError,
    InvalidRequestError,
    MiniInferError,
    NotFiniteError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
    StepError,
)
from mini_infer.sampling import SamplingParams

logger = logging.getLogger(__name__)

_EXPLAINED = {
    400: "the body cannot be read; it must be JSON in UTF-8",
    404: "there is no such endpoint; /docs lists them all",
    405: "this endpoint does not take that method; /docs lists them all",
}
"""Of what the framework itself raises, the errors whose own words say less."""

_OPTIONS = {"prompt", "reasoning_effort", *(field.name for field in fields(SamplingParams))}

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: the HTTP status.
        message: what was wrong, and what to do.
        param: the request's field that is to blame.
        code: for programs to tell errors of one status apart.
        headers: sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class JsonResponse(Response):
    """JSON that holds whatever a request may have brought: half of a surrogate pair becomes a question mark."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def as_api_error(error: Exception) -> ApiError:
    """The answer to any exception; one that nobody expected is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors(), 400)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, _EXPLAINED.get(error.status_code, str(error.detail)), headers=error.headers)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, InvalidRequestError | OutOfMemoryError):
        return _invalid(error, 400)
    if isinstance(error, StepError):  # logged by the engine
        return ApiError(500, "a step of the engine failed, and this request with it; try again", code="step_failed")
    if isinstance(error, RequestError):  # logged as well
        code = "not_finite" if isinstance(error, NotFiniteError) else "request_failed"
        return ApiError(500, str(error), code=code)
    if isinstance(error, MiniInferError):  # the engine was shut down under a request
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": "5"})
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed to answer ({type(error).__name__}); its log says more", code="internal")


def respond(error: ApiError) -> JsonResponse:
    return JsonResponse(error.body(), error.status, error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Have an app answer every exception in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> JsonResponse:
        return respond(as_api_error(error))

    for kind in (ApiError, RequestValidationError, HTTPException, MiniInferError, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(error: Exception, status: int) -> ApiError:
    """What the engine has against a request. Where that is an option, its name comes first."""
    if isinstance(error, ContextLengthError):
        return ApiError(status, str(error), code="context_length_exceeded")
    name = re.match(r"\w+", str(error))
    return ApiError(status, str(error), param=name[0] if name and name[0] in _OPTIONS else None)


def unprocessable(error: InvalidRequestError) -> ApiError:
    """The same by FastAPI's convention: what is wrong with a request is status 422, not OpenAI's 400."""
    return _invalid(error, 422)


def validation_error(errors: Seq[Any], status: int) -> ApiError:
    """The first of the fields that a body has wrong; but a limit goes before the other ways to read a field."""
    first = next((error for error in errors if error["type"] in ("too_long", "string_too_long")), errors[0])
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] in ("model_type", "model_attributes_type", "missing") and not place:
        return ApiError(status, "the body must be a JSON object")
    if first["type"] == "extra_forbidden":
        return ApiError(status, f"{'.'.join(place)} is not an option that this endpoint knows", param=".".join(place))
    param = first.get("ctx", {}).get("param") or ".".join(place) or None
    message = first["msg"] if "param" in first.get("ctx", {}) else f"{param or 'the body'}: {first['msg']}"
    return ApiError(status, message, param=param)
