"""What every request passes before anything looks at it: is the caller allowed in, and is the body of a sane size?"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Sequence as Seq
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mini_infer.serving.admission import Budget
from mini_infer.serving.errors import ApiError, respond
from mini_infer.serving.pools import SMALL

_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a caller's id of a request may be: something that a header can send back, and a log can show."""

_PUBLIC = ("/", "/docs", "/openapi.json", "/health", "/v1/health")
"""What needs no key: it shows nothing of what others ask. So does everything under ``/page/``."""

_ID = "x-request-id"

KEY = "mini_infer.key"
"""Where a request's scope says whose key it showed: the beginning of the key's hash."""


class NameRequests:
    """Gives every answer, errors too, an ``X-Request-Id``: the caller's own, the answer's id, or one that is made."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_ID, "")

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if _GIVEN_ID.fullmatch(given):
                    headers[_ID] = given
                elif _ID not in headers:
                    headers[_ID] = f"req-{secrets.token_hex(12)}"
            await send(message)

        await self._app(scope, receive, send_named)


class TidyPaths:
    """A path with a slash behind it means the same without."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/page/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class KnowPages:
    """Refuses what a browser sends on behalf of somebody else's page, where no key would tell the two apart.

    A page can have a browser send requests to any address. It cannot forge ``Origin``; but its name may lead to this
    machine (DNS rebinding), and then its requests are not foreign, except for the name in ``Host``.

    Args:
        hosts: names, beside addresses and localhost, by which this server may be called on a loopback address.
        origins: whose pages may send requests; "*" is any.
    """

    def __init__(self, app: ASGIApp, hosts: Seq[str], origins: Seq[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await respond(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        server = scope.get("server")
        is_local = server is not None and _is_address(server[0]) and ipaddress.ip_address(server[0]).is_loopback
        if is_local and host and not self._knows(_name(host)):
            raise ApiError(
                403,
                f"this server is not called {_name(host)[:100]!r}; start it with --allowed-host if it is",
                code="host_not_allowed",
            )
        if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            place = origin.partition("://")[2]
            known = place.lower() == host.lower() or _name(place) in self._hosts
            if not known and not self._origins & {origin, "*"}:
                raise ApiError(
                    403,
                    f"pages of {origin[:100]!r} may not send requests here; start the server with --cors if they may",
                    code="origin_not_allowed",
                )

    def _knows(self, name: str) -> bool:
        return _is_address(name) or name == "localhost" or name.endswith(".localhost") or name in self._hosts


def _name(host: str) -> str:
    """The name of a host with or without a port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class RequireKey:
    """Refuses callers that do not show one of the keys, as ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``."""

    def __init__(self, app: ASGIApp, keys: Seq[str]) -> None:
        self._app = app
        self._keys = {key.encode(): hashlib.sha256(key.encode()).hexdigest()[:16] for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            error = ApiError(
                401,
                "the API key is missing or wrong; send one that the server was started with, "
                "as the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await respond(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        kind, _, shown = headers.get("authorization", "").partition(" ")
        given = (shown if kind.lower() == "bearer" else headers.get("x-api-key", "")).strip().encode("latin-1")
        matches = [name for key, name in self._keys.items() if hmac.compare_digest(given, key)]
        if matches:
            scope[KEY] = matches[0]
            return True
        path = scope["path"]
        return path in _PUBLIC or path.startswith("/page/")


class BoundBody:
    """Takes a request's body in before anybody parses it, unless it is too large or too slow in coming.

    Args:
        max_bytes: largest body.
        timeout: seconds within which it must be there.
        held: how much all bodies may come to that are being taken in, beyond the small beginning of each.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float, held: Budget) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            taken = await asyncio.wait_for(self._take_in_or_refuse(scope, receive), self._timeout)
        except asyncio.TimeoutError:
            taken = ApiError(
                408,
                f"the body was not there within {self._timeout:g} seconds",
                code="slow_body",
                headers={"connection": "close"},
            )
        if isinstance(taken, ApiError):
            await respond(taken)(scope, receive, send)
            return
        messages = taken
        if messages[0]["type"] == "http.disconnect":
            return  # nobody waits for an answer

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _take_in_or_refuse(self, scope: Scope, receive: Receive) -> list[Message] | ApiError:
        """As ``_take_in``. An error that ``wait_for`` raises refers to itself by its traceback: what was refused would
        be held until the collector comes."""
        try:
            return await self._take_in(scope, receive)
        except ApiError as error:
            return error.with_traceback(None)

    async def _take_in(self, scope: Scope, receive: Receive) -> list[Message]:
        """All of the body as one message; what else came instead, if the client left."""
        announced = Headers(scope=scope).get("content-length", "0")
        self._check(int(announced) if announced.isdecimal() else 0)
        pieces: list[bytes] = []  # many bodies that grow side by side would leave holes of all sizes in memory
        num_bytes = num_held = 0
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return [message]
                pieces.append(message.get("body", b""))
                num_bytes += len(pieces[-1])
                self._check(num_bytes)
                if (more := num_bytes - SMALL - num_held) > 0:
                    self._held.take(more)
                    num_held += more
                if not message.get("more_body", False):
                    return [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]
        finally:
            self._held.give_back(num_held)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ApiError(
                413,
                f"the body has more than body_bytes={self._max_bytes} bytes, the most that is taken",
                code="body_too_large",
            )
