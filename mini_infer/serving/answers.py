"""Answers that take a while: whole or as server-sent events, given up when the client leaves or the time is over."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mini_infer.serving.admission import Admission
from mini_infer.serving.errors import ApiError, as_api_error, encode
from mini_infer.serving.pools import Pool

DONE = b"data: [DONE]\n\n"
"""What OpenAI's streams end with."""

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]


_LARGE = 4096
"""Numbers in an answer from which on it is put together on another thread."""

_BLOCK = 1 << 16
"""Bytes that are sent at once."""

_ITEMS = 64
"""Items of a list that are encoded at once."""


def event(content: Any, kind: str | None = None) -> bytes:
    """One server-sent event, of a kind if there are several."""
    head = b"" if kind is None else b"event: " + kind.encode() + b"\n"
    return head + b"data: " + encode(content) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole answer.

    Attributes:
        content: what becomes JSON; an iterator in it becomes a list, and its items need not be there together.
        num_values: about how many numbers it holds.
    """

    content: dict[str, Any]
    num_values: int

    def blocks(self) -> Iterator[bytes]:
        """JSON, a block at a time; none of it takes long to encode, however long the answer."""
        block = bytearray()
        for piece in _pieces(self.content):
            block += piece
            if len(block) >= _BLOCK:
                yield bytes(block)
                block.clear()
        yield bytes(block)


def _pieces(content: Any) -> Iterator[bytes]:
    if isinstance(content, dict) and content:
        before = b"{"
        for name, value in content.items():
            yield before + encode(name) + b":"
            yield from _pieces(value)
            before = b","
        yield b"}"
    elif isinstance(content, list) and len(content) > _ITEMS:
        for start in range(0, len(content), _ITEMS):
            yield (b"," if start else b"[") + encode(content[start : start + _ITEMS])[1:-1]
        yield b"]"
    elif isinstance(content, Iterator):
        before = b"["
        for item in content:
            yield before
            yield from _pieces(item)
            before = b","
        yield b"[]" if before == b"[" else b"]"
    else:
        yield encode(content)


class Answer(Response):
    """Does the work when it is sent, so that the work ends with the connection.

    Until the first event is there, be it an empty one, errors have a status of their own; later ones become the
    stream's last event.

    Args:
        work: begins it: a coroutine that makes the body, or an async generator of events.
        admission: counts it among the requests under way; None for what nobody has to wait for.
        timeout: seconds until it is given up with status 408; None for as long as it takes.
        headers: sent along.
        pool: where large answers are put together.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, Whole] | AsyncGenerator[bytes, None]],
        admission: Admission | None,
        timeout: float | None,
        headers: dict[str, str],
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        self._work = work
        self._admission = admission
        self._timeout = timeout
        self._extra_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._pool = pool
        self._started = False
        self._streams = False

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
            except ApiError:
                raise  # not from itself, which would be a cycle, too
            except Exception as error:
                raise as_api_error(error) from error
            finally:
                await _cancel(work, left)
                del work  # whose error refers to this frame, and so to the request: both would wait for the collector

    async def _give_up(self, work: "asyncio.Future[None]", send: Send) -> None:
        await _cancel(work)
        error = ApiError(
            408,
            f"not finished within the {self._timeout:g} seconds that this server allows a request",
            headers={"x-should-retry": "false"},  # OpenAI's clients would have it computed again
        )
        if not self._started:
            raise error
        if not self._streams:
            return  # which closes the connection
        last = asyncio.ensure_future(send(_body(event(error.body()), more=False)))
        await asyncio.wait({last}, timeout=1)  # a client that does not read is not waited for
        await _cancel(last)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._work()
        if isinstance(work, Coroutine):
            await self._send_whole(await work, send)
            return
        self._streams = True
        async with aclosing(work) as events:
            first = await anext(events, b"")
            await self._send_head(_EVENT_STREAM, send)
            await send(_body(first, more=True))
            try:
                async for piece in events:
                    await send(_body(piece, more=True))
            except Exception as error:
                await send(_body(event(as_api_error(error).body()), more=True))
        await send(_body(b"", more=False))

    async def _send_whole(self, whole: Whole, send: Send) -> None:
        """One block says how long it is; more than one are sent as they are made."""
        blocks = whole.blocks()

        def following() -> bytes | None:
            return next(blocks, None)

        async def elsewhere() -> bytes | None:
            return following() if self._pool is None or whole.num_values < _LARGE else await self._pool.run(following)

        block, after = await elsewhere() or b"", await elsewhere()
        length = [(b"content-length", b"%d" % len(block))] if after is None else []
        await self._send_head([(b"content-type", b"application/json"), *length], send)
        while after is not None:
            await send(_body(block, more=True))
            block, after = after, await elsewhere()
        await send(_body(block, more=False))

    async def _send_head(self, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, *self._extra_headers]})


async def _cancel(*tasks: "asyncio.Future[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(content: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
