"""The queue before the engine's own: callers take turns, so that nobody stands behind all of one caller's requests.

The engine takes requests in the order in which they come. So it is given few at a time: as many as it begins soon. The
others wait here, each caller's in a line of their own, and the lines are served in turn. When too many wait, it is the
longest line that grows no more, or becomes shorter (McKenney, "Stochastic fairness queueing", 1990).
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from functools import partial

from mini_infer.engine import AsyncLLMEngine
from mini_infer.engine.async_engine import Increments, Run
from mini_infer.engine.intake import Prompt
from mini_infer.engine.request import Request
from mini_infer.exceptions import MiniInferError, QueueFullError, StepError
from mini_infer.outputs import Increment
from mini_infer.sampling import SamplingParams
from mini_infer.serving.admission import Budget

AHEAD = 8
"""Requests that the engine has before it begins them, though it has no seat for them; what comes next waits here."""

AHEAD_WITH_SEATS = 64
"""The same while it has seats."""


class _Ticket:
    """One caller's requests that were submitted together, and wait."""

    def __init__(self, increments: Increments, priority: int) -> None:
        self.increments = increments
        self.priority = priority
        self.waiting = deque(increments.requests)


class Turns:
    """Hands requests over to the engine, one caller after the other.

    Args:
        engine: who takes them.
        max_waiting: requests that may wait, here and there.
        held_prompt_tokens: what their prompts may come to.
    """

    def __init__(self, engine: AsyncLLMEngine, max_waiting: int, held_prompt_tokens: Budget) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._prompt_tokens = held_prompt_tokens
        self._num_seats = engine.config.max_num_seqs
        self._by_priority = engine.config.scheduling_policy == "priority"
        self._lines: dict[Hashable, deque[_Ticket]] = {}  # whose turn it is comes first
        self._preparing: Counter[Hashable] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # the engine's thread says what has begun and ended
        self._ahead: set[Request] = set()
        self._open: dict[Request, Hashable] = {}  # and whose they are
        engine.observe(self._observe)

    @property
    def num_waiting(self) -> int:
        """Requests that wait here, or are being prepared to."""
        num_prepared = sum(len(ticket.waiting) for line in self._lines.values() for ticket in line)
        return num_prepared + sum(self._preparing.values())

    async def submit(
        self,
        caller: Hashable,
        prompts: Seq[Prompt],
        params: SamplingParams,
        *,
        request_ids: Seq[str],
        priority: int,
        run: Run,
    ) -> Increments:
        """Put requests into their caller's line, all or none of them.

        Args:
            caller: whose they are.
            run: where prompts are read.

        The other arguments are those of ``AsyncLLMEngine.submit``.

        Raises:
            InvalidRequestError: a prompt or a parameter is unusable.
            QueueFullError: too many wait, and most of them are this caller's.
            ApiError: too many prompt tokens are held already.
        """
        self._loop = asyncio.get_running_loop()
        self._make_room(caller, len(prompts))  # before the work
        self._preparing[caller] += len(prompts)
        try:
            increments = await self._engine.prepare(
                prompts, params, request_ids=request_ids, priority=priority, caller=caller, run=run
            )
        finally:
            self._preparing[caller] -= len(prompts)
            self._preparing += Counter()  # without those who have none left
        self._make_room(caller, len(prompts))
        num_tokens = params.n * sum(len(request.prompt_token_ids) for request in increments.requests)
        self._prompt_tokens.take(num_tokens)
        increments.on_close(partial(self._prompt_tokens.give_back, num_tokens))
        ticket = _Ticket(increments, priority)
        increments.on_close(partial(self._withdraw, caller, ticket))
        line = self._lines.setdefault(caller, deque())
        line.append(ticket)
        if self._by_priority:
            self._lines[caller] = deque(sorted(line, key=lambda ticket: -ticket.priority))
        self._hand_over()
        return increments

    def cancel(self, increments: Increments, request_id: str) -> None:
        """End one of some requests with reason "abort", wherever it is."""
        for line in self._lines.values():
            for ticket in line:
                if ticket.increments is increments:
                    for request in [waiting for waiting in ticket.waiting if waiting.request_id == request_id]:
                        ticket.waiting.remove(request)
                        increments.drop_one()
        self._lines = {who: left for who, line in self._lines.items() if (left := _not_empty(line))}
        self._engine.abort(request_id)

    def _make_room(self, caller: Hashable, num_new: int) -> None:
        """Raise ``QueueFullError`` if too many wait, unless somebody holds more of the queue than this caller: then the
        last of that one's requests make room. Those that are still being prepared are refused once they are."""
        with self._lock:
            num_ahead = len(self._ahead)
        while (num_waiting := self.num_waiting + num_ahead) + num_new > self._max_waiting:
            lengths = Counter(self._preparing)
            for who, line in self._lines.items():
                lengths[who] += sum(len(ticket.waiting) for ticket in line)
            num_own = lengths.pop(caller, 0) + num_new
            longest, length = max(lengths.items(), key=lambda item: item[1], default=(caller, 0))
            error = QueueFullError(
                f"{num_waiting} requests wait already and max_waiting is {self._max_waiting}; try again later"
            )
            if length <= num_own:
                raise error
            if longest not in self._lines:
                return
            last = self._lines[longest][-1]
            self._withdraw(longest, last)
            last.increments.fail(error)

    def _withdraw(self, caller: Hashable, ticket: _Ticket) -> None:
        ticket.waiting.clear()
        line = self._lines.get(caller)
        if line is not None and ticket in line:
            line.remove(ticket)
            if not line:
                del self._lines[caller]

    def _hand_over(self) -> None:
        """Give the engine what it may have."""
        while (caller := self._next()) is not None:
            line = self._lines.pop(caller)
            ticket = line[0]
            request = ticket.waiting.popleft()
            if not ticket.waiting:
                line.popleft()
            if line:
                self._lines[caller] = line  # behind all others
            with self._lock:
                self._ahead.add(request)
                self._open[request] = caller
            try:
                started = asyncio.ensure_future(self._engine.start(ticket.increments, [request]))
            except MiniInferError as error:  # the engine was shut down
                self._failed(ticket, request, error)
            else:
                started.add_done_callback(partial(self._started, ticket, request))

    def _next(self) -> Hashable | None:
        """Whose turn it is among those who may hand over a request now."""
        callers = list(self._lines)
        if self._by_priority:
            callers.sort(key=lambda caller: -self._lines[caller][0].priority)
        with self._lock:
            num_ahead, who_has_any = len(self._ahead), set(self._open.values())
            num_taken = sum(request.params.n for request in self._open)
        is_free = num_ahead < (AHEAD_WITH_SEATS if num_taken < self._num_seats else AHEAD)
        return next((caller for caller in callers if is_free or caller not in who_has_any), None)

    def _started(self, ticket: _Ticket, request: Request, started: "asyncio.Future[None]") -> None:
        error = None if started.cancelled() else started.exception()
        if error is not None:
            self._failed(ticket, request, error if isinstance(error, Exception) else StepError(repr(error)))

    def _failed(self, ticket: _Ticket, request: Request, error: Exception) -> None:
        with self._lock:
            self._ahead.discard(request)
            self._open.pop(request, None)
        ticket.increments.fail(error)

    def _observe(self, request: Request, increment: Increment) -> None:
        """On the engine's thread: a request has begun, or ended."""
        with self._lock:
            is_news = request in self._ahead or increment.output is not None
            self._ahead.discard(request)
            if increment.output is not None:
                self._open.pop(request, None)
        if is_news and self._lines and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_over)


def _not_empty(line: "deque[_Ticket]") -> "deque[_Ticket]":
    return deque(ticket for ticket in line if ticket.waiting)
