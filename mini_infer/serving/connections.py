"""Connections that do nothing: each has a time limit, and when there are too many the oldest makes room."""

import asyncio
import logging
import math
import os
import time
from typing import Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mini_infer.serving.pools import SMALL

HEADER_SECONDS = 20.0
"""How long a connection may take until a request's headers are there."""

SEND_SECONDS = 60.0
"""How long a client may read nothing of what is sent to it."""

BACKLOG = 128
"""Connections that may be accepted before any of them is looked at."""

QUEUE = 2048
"""Connections that may wait in the kernel; beyond them clients try again after a second."""

MAX_CONNECTIONS = 8192
"""Most connections, however many files may be open."""

READ_BYTES = 1 << 14
"""Read at once: a request in chunks of one byte takes long to parse, and others have their turn in between."""

BYTES_PER_SECOND = 16 << 20
"""How fast all bodies together may come in, beyond the first 64 KiB of each. Taking in a MiB costs the event loop some
milliseconds, whether it is used or thrown away."""

BURST = 1 << 20
"""Bytes that may come at any speed after a pause."""

_SPARE_FILES = 64
"""Files that everything else may open."""


def max_connections() -> int:
    """Raise the limit of open files as far as allowed; how many connections fit under it."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are no files
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + BACKLOG + 4 * _SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError):
            pass  # as on systems with a limit of their own
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    lowest = os.dup(0)  # as good as the number of files that are open
    os.close(lowest)
    return max(8, min(MAX_CONNECTIONS, soft - lowest - BACKLOG - _SPARE_FILES))


class Pace:
    """How fast something may come, all together: whoever brings some waits until it is paid for, in turn.

    Args:
        per_second: how much.
        burst: how much at once, after a pause.
    """

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst_seconds = burst / per_second
        self._paid_at = -math.inf

    def wait(self, amount: float, now: float) -> float:
        """For how many seconds from ``now`` whoever brought so much should bring no more."""
        self._paid_at = max(self._paid_at, now - self._burst_seconds) + amount / self._per_second
        return max(0.0, self._paid_at - now)


class Connection(H11Protocol):
    """Uvicorn's, with limits. ``bounded`` makes the class that a server uses."""

    most: ClassVar[int]
    pace: ClassVar[Pace]
    idle: "ClassVar[dict[Connection, None]]"
    """Those of this server that wait for a request, the oldest first."""

    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _slowed: asyncio.TimerHandle | None = None
    _num_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        cast(Any, transport).max_size = READ_BYTES
        if len(self.connections) > self.most:
            oldest = next(iter(self.idle), self)
            self.idle.pop(oldest, None)
            oldest.transport.abort()
            if oldest is self:
                return
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:  # a request begins
            self._num_bytes = 0
        super().data_received(data)
        self._num_bytes += len(data)
        if self._num_bytes > SMALL and (seconds := self.pace.wait(len(data), self.loop.time())) > 0:
            self._slow_down(seconds)
        if not self._waits():
            self._forget_waiting()
        elif self._deadline is None and not self.transport.is_closing():
            self._wait_for_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._waits() and not self.transport.is_closing():
            self.idle[self] = None  # for as long as connections are kept alive

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_waiting()
        for timer in (self._stalled, self._slowed):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _slow_down(self, seconds: float) -> None:
        """Read nothing for a while, whether it would be used or only thrown away."""
        if self._slowed is not None:
            self._slowed.cancel()
        self.transport.pause_reading()
        self._slowed = self.loop.call_later(seconds, self._read_on)

    def _read_on(self) -> None:
        self._slowed = None
        if not self.flow.read_paused:  # or else whoever takes the data reads on
            self.transport.resume_reading()

    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        self.idle[self] = None
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _forget_waiting(self) -> None:
        self.idle.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self._waits():
            self.transport.abort()


def bounded(num_connections: int) -> type[Connection]:
    """The class of one server's connections, of which there may be so many at once."""

    class Bounded(Connection):
        most = num_connections
        pace = Pace(BYTES_PER_SECOND, BURST)
        idle: ClassVar[dict[Connection, None]] = {}

    return Bounded


class FewLines(logging.Filter):
    """Lets so many lines through in each period, and says how many it did not.

    Args:
        most: lines in a period.
        seconds: how long one is.
    """

    def __init__(self, most: int, seconds: float) -> None:
        super().__init__()
        self._most = most
        self._seconds = seconds
        self._since = time.monotonic()
        self._num_lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() - self._since >= self._seconds:
            left_out = self._num_lines - self._most
            self._since, self._num_lines = time.monotonic(), 0
            if left_out > 0:
                record.msg, record.args = f"{record.getMessage()} ({left_out} lines before it were left out)", ()
        self._num_lines += 1
        return self._num_lines <= self._most
