"""How a body becomes an object: large ones on a thread of their own, and none whose mere reading takes long."""

import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, TypeVar, get_type_hints

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from mini_infer.exceptions import InvalidRequestError
from mini_infer.serving.errors import ApiError, JsonResponse, unprocessable, validation_error
from mini_infer.serving.limits import Limits
from mini_infer.serving.pools import SMALL, Pool

_Body = TypeVar("_Body", bound=BaseModel)

_PIECE = 1 << 16
"""Bytes that are looked through at once: others have their turn in between."""


def body_router(limits: Limits, pool: Pool, status: int = 400) -> APIRouter:
    """A router whose endpoints are called as ``endpoint(request, body)`` or, without a body, as FastAPI does.

    Args:
        limits: for bodies.
        pool: where large ones are read.
        status: of the answer to one that is wrong: 400 as OpenAI has it, or 422 as FastAPI has.
    """

    class Route(_BodyRoute):
        limits_, pool_, status_ = limits, pool, status

    return APIRouter(route_class=Route)


class _BodyRoute(APIRoute):
    limits_: ClassVar[Limits]
    pool_: ClassVar[Pool]
    status_: ClassVar[int]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler() if self.body_field is None else self._handle_body

        async def in_their_words(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise validation_error(error.errors(), self.status_) from error
            except InvalidRequestError as error:
                if self.status_ == 400:
                    raise
                raise unprocessable(error) from error

        return in_their_words

    async def _handle_body(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        raw = b"".join([piece async for piece in request.stream()])
        if raw and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            # Which also keeps pages of other sites from having a browser send requests here.
            message = "the body must be a JSON object, sent with the header Content-Type: application/json"
            raise ApiError(self.status_, message, code="not_json")
        model = get_type_hints(self.endpoint)["body"]
        parse = partial(parse_body, raw, model, self.limits_.json_values, self.status_)
        body = parse() if len(raw) <= SMALL else await self.pool_.run(parse)
        answer = await self.endpoint(request=request, body=body)
        return answer if isinstance(answer, Response) else JsonResponse(answer)


def parse_body(raw: bytes, model: type[_Body], most_values: int, status: int) -> _Body:
    """The object that a body is, checked.

    Raises:
        ApiError: it is none, with ``status``; or it holds more than ``most_values``, with 413.
    """
    if has_more_values(raw, most_values):
        raise ApiError(
            413,
            f"the body holds more than json_values={most_values} numbers, strings, lists and objects",
            code="too_large",
        )
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(status, f"the body is not valid JSON in UTF-8: {error}"[:300], code="invalid_json") from error
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), status) from error


def has_more_values(raw: bytes, most: int) -> bool:
    """Whether a body of JSON holds more numbers, strings, lists and objects than that, found without reading it."""
    pieces = (raw[start : start + _PIECE] for start in range(0, len(raw), _PIECE))
    number, within_string, held = 0, False, b""
    for piece in pieces:
        piece = (held + piece).replace(b"\\\\", b"")
        held = b"\\" if piece.endswith(b"\\") else b""  # which belongs to what begins the next piece
        parts = piece.removesuffix(held).replace(b'\\"', b"").split(b'"')  # every quote begins or ends a string
        number += _num_values(b"".join(parts[within_string::2]))
        within_string ^= len(parts) % 2 == 0
        if number > most:
            return True
    return False


def _num_values(raw: bytes) -> int:
    """At least as many as there are; strings may hold these characters, too."""
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")
