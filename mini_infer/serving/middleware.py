"""What every request passes before anything looks at it: is the caller allowed in, and is the body of a sane size?"""

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mini_infer.serving.errors import ApiError, respond

_PUBLIC = ("/", "/docs", "/openapi.json", "/health", "/v1/health", "/metrics")
"""What needs no key: it shows nothing of what others ask. So does everything under ``/page/``."""


class RequireKey:
    """Refuses callers that do not show the key, as ``Authorization: Bearer KEY``."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            error = ApiError(
                401,
                "the API key is missing or wrong; send the one that the server was started with, "
                "as the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await respond(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"]
        if path in _PUBLIC or path.startswith("/page/"):
            return True
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key)


class BoundBody:
    """Takes a request's body in before anybody parses it, unless it is too large or too slow in coming.

    Args:
        max_bytes: largest body.
        timeout: seconds within which it must be there.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            messages = await asyncio.wait_for(self._take_in(scope, receive), self._timeout)
        except asyncio.TimeoutError:
            error = ApiError(
                408,
                f"the body was not there within {self._timeout:g} seconds",
                code="slow_body",
                headers={"connection": "close"},
            )
            await respond(error)(scope, receive, send)
        except ApiError as error:
            await respond(error)(scope, receive, send)
        else:
            waiting = iter(messages)

            async def replay() -> Message:
                message = next(waiting, None)
                return await receive() if message is None else message

            await self._app(scope, replay, send)

    async def _take_in(self, scope: Scope, receive: Receive) -> list[Message]:
        """All of the body as one message; what else came instead, if the client left."""
        announced = Headers(scope=scope).get("content-length", "0")
        self._check(int(announced) if announced.isdecimal() else 0)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return [message]
            body += message.get("body", b"")
            self._check(len(body))
            if not message.get("more_body", False):
                return [{"type": "http.request", "body": bytes(body), "more_body": False}]

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ApiError(
                413, f"the body has more than {self._max_bytes} bytes, the most that is taken", code="body_too_large"
            )
