"""Answers that take a while: whole or as server-sent events, given up when the client leaves or the time is over."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, nullcontext
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mini_infer.serving.admission import Admission
from mini_infer.serving.errors import ApiError, JsonResponse, as_api_error, encode

DONE = b"data: [DONE]\n\n"
"""What OpenAI's streams end with."""

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


class Answer(Response):
    """Does the work when it is sent, so that the work ends with the connection.

    Until the first event is there, be it an empty one, errors have a status of their own; later ones become the
    stream's last event.

    Args:
        work: begins it: a coroutine that makes the body, or an async generator of events.
        admission: counts it among the requests under way; None for what nobody has to wait for.
        timeout: seconds until it is given up with status 408; None for as long as it takes.
        headers: sent along.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, Any] | AsyncGenerator[bytes, None]],
        admission: Admission | None,
        timeout: float | None,
        headers: dict[str, str],
    ) -> None:
        super().__init__()
        self._work = work
        self._admission = admission
        self._timeout = timeout
        self._extra_headers = headers
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with nullcontext() if self._admission is None else self._admission.admit():
            work = asyncio.ensure_future(self._send(scope, receive, send))
            left = asyncio.ensure_future(_disconnect(receive))
            try:
                await asyncio.wait({work, left}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
                if not work.done() and not left.done():
                    await self._give_up(work, send)
                elif work.done():
                    work.result()
            except Exception as error:
                raise as_api_error(error) from error
            finally:
                await _cancel(work, left)

    async def _give_up(self, work: "asyncio.Future[None]", send: Send) -> None:
        await _cancel(work)
        error = ApiError(408, f"not finished within the {self._timeout:g} seconds that this server allows a request")
        if not self._started:
            raise error
        last = asyncio.ensure_future(send(_body(event(error.body()), more=False)))
        await asyncio.wait({last}, timeout=1)  # a client that does not read is not waited for
        await _cancel(last)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._work()
        if isinstance(work, Coroutine):
            await JsonResponse(await work, headers=self._extra_headers)(scope, receive, send)
            return
        async with aclosing(work) as events:
            first = await anext(events, b"")
            self._started = True
            headers = [(name.encode(), value.encode()) for name, value in self._extra_headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": [*_EVENT_STREAM, *headers]})
            await send(_body(first, more=True))
            try:
                async for piece in events:
                    await send(_body(piece, more=True))
            except Exception as error:
                await send(_body(event(as_api_error(error).body()), more=True))
        await send(_body(b"", more=False))


async def _cancel(*tasks: "asyncio.Future[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(content: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
