"""The engine for asyncio: steps run on a thread of their own, results arrive in the event loop."""

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from mini_infer.config import EngineConfig
from mini_infer.engine.intake import Prompt
from mini_infer.engine.llm_engine import LLMEngine
from mini_infer.engine.request import Request
from mini_infer.exceptions import MiniInferError, StepError
from mini_infer.outputs import Increment
from mini_infer.sampling import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")

Observer: TypeAlias = Callable[[Request, Increment], None]
"""Told of every increment of every request, on the engine's thread."""

_Arrivals: TypeAlias = asyncio.Queue[Increment | Exception]


_HANDFUL = 16
"""Increments handed over before an event loop may look after other things."""


class _Mailbox:
    """Increments on their way into one event loop: in order, and never so many at once that they hold it up."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[_Arrivals, Increment | Exception]] = deque()

    def take(self, parcel: Seq[tuple[_Arrivals, Increment | Exception]]) -> None:
        is_handing_over = bool(self._waiting)
        self._waiting.extend(parcel)
        if not is_handing_over:
            self._hand_over()

    def _hand_over(self) -> None:
        for _ in range(min(_HANDFUL, len(self._waiting))):
            arrivals, item = self._waiting.popleft()
            arrivals.put_nowait(item)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._hand_over)


@dataclass(frozen=True, slots=True)
class _Listener:
    """Where a request's increments go: a queue in somebody's event loop."""

    loop: asyncio.AbstractEventLoop
    mailbox: _Mailbox
    arrivals: _Arrivals


class Increments(AsyncIterator[Increment]):
    """What the steps add to some requests, as it comes; the last increment of each carries its whole ``output``.

    A context manager: requests that have not ended when it is left are aborted.

    Attributes:
        requests: whose increments these are, in the order of their prompts.
    """

    def __init__(self, requests: Seq[Request], arrivals: _Arrivals, close: Callable[[], None]) -> None:
        self.requests = requests
        self.close = close
        self._arrivals = arrivals
        self._num_open = len(requests)

    async def __anext__(self) -> Increment:
        if self._num_open == 0:
            raise StopAsyncIteration
        increment = await self._arrivals.get()
        if isinstance(increment, Exception):
            self._num_open = 0
            raise increment
        self._num_open -= increment.output is not None
        return increment

    def __enter__(self) -> "Increments":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncLLMEngine:
    """Generates for many concurrent tasks; all of them share each step.

    The event loop never waits for the model: it puts commands into an inbox, which the engine's thread empties between
    steps; all that a step brought comes back in one piece.

    Args:
        config, fields: as for ``LLMEngine``.
    """

    def __init__(self, config: EngineConfig | None = None, **fields: Any) -> None:
        self.engine = LLMEngine(config, **fields)
        self._observers: list[Observer] = []
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # These two are touched by the engine's thread alone.
        self._listening: dict[Request, _Listener] = {}
        self._outbox: list[tuple[Request, _Listener, Increment | Exception]] = []
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = WeakKeyDictionary()
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no command comes in after the thread was told to stop
        self._thread = threading.Thread(target=self._work, name="mini-infer-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: true until ``shutdown``."""
        return self._thread.is_alive() and not self._stopping.is_set()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[Increment]:
        """Complete one prompt, increment by increment; the last one carries the whole ``output``.

        Leaving the loop, or cancelling the task, aborts the request.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
            QueueFullError: ``max_waiting`` requests wait already.
            StepError: a step failed that this request was in.
            MiniInferError: the engine was shut down.
        """
        with await self.submit([prompt], sampling_params, request_ids=[request_id]) as increments:
            async for increment in increments:
                yield increment

    async def submit(
        self,
        prompts: Seq[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        request_ids: Seq[str | None],
        priority: int = 0,
    ) -> Increments:
        """Queue one request per prompt, all or none of them; returns once they are queued.

        Args:
            request_ids: one for each prompt; None makes one.

        The other arguments and the errors are those of ``generate``.
        """
        loop = asyncio.get_running_loop()
        listener = _Listener(loop, self._mailboxes.setdefault(loop, _Mailbox()), asyncio.Queue())

        def prepare() -> list[Request]:
            return [
                self._prepare(prompt, sampling_params, request_id, priority, listener)
                for prompt, request_id in zip(prompts, request_ids, strict=True)
            ]

        requests = await asyncio.to_thread(prepare)

        def close() -> None:
            self._inbox.put(lambda: self._forget(requests))

        try:
            await self.call(lambda engine: self._enqueue(requests, listener))
        except BaseException:  # above all a cancellation, which the command may or may not have preceded
            close()
            raise
        return Increments(requests, listener.arrivals, close)

    async def call(self, function: Callable[[LLMEngine], T]) -> T:
        """What a function of the engine returns or raises, run between two steps on the engine's thread.

        Raises:
            MiniInferError: the engine was shut down.
        """
        result: concurrent.futures.Future[T] = concurrent.futures.Future()

        def command() -> None:
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(function(self.engine))
                except Exception as error:
                    result.set_exception(error)

        with self._lock:
            if self._stopping.is_set():
                raise MiniInferError("the engine was shut down; make a new one")
            self._inbox.put(command)
        return await asyncio.wrap_future(result)

    def observe(self, observer: Observer) -> None:
        """Have an observer told of every increment from now on. It must be quick, and raise nothing."""
        self._observers.append(observer)

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"; its iterator ends with what there is. Unknown ids are ignored: a request
        may finish while the command is on its way."""

        def command() -> None:
            self.engine.discard([request for request in self._listening if request.request_id == request_id])

        self._inbox.put(command)

    def shutdown(self) -> None:
        """Abort what runs and stop the thread. Safe to call twice."""
        with self._lock:
            self._stopping.set()
        self._inbox.put(lambda: None)  # wakes the thread if it is idle
        self._thread.join()

    async def __aenter__(self) -> "AsyncLLMEngine":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)

    # ---- on the engine's thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping.is_set():
            if self.engine.is_finished():
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()
            try:
                self.engine.step()
            except Exception as error:
                self._fail(error)
            self._send()
        while not self._inbox.empty():  # requests that came in last are aborted as well, not left waiting
            self._inbox.get()()
        self._forget(list(self._listening))
        self._send()

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        listener: _Listener,
    ) -> Request:
        """Make a request; this runs on any thread, but what the request then tells is told on the engine's."""

        def tell(increment: Increment) -> None:
            for observe in self._observers:
                observe(request, increment)
            self._outbox.append((request, listener, increment))

        request = self.engine.make_request(prompt, params, request_id=request_id, priority=priority, listener=tell)
        return request

    def _enqueue(self, requests: Seq[Request], listener: _Listener) -> None:
        for request in requests:
            self.engine.submit(request)
            self._listening[request] = listener

    def _forget(self, requests: Seq[Request]) -> None:
        """Nobody waits for these requests any more: abort those that still run."""
        for request in requests:
            self._listening.pop(request, None)
        self.engine.discard(requests)

    def _fail(self, error: Exception) -> None:
        """A step raised. Which request is to blame cannot be told, so all that have begun fail; the others wait on."""
        begun = [request for request in self._listening if request.first_scheduled_time is not None]
        failing = begun or list(self._listening)  # so that a request which cannot even begin does not block the queue
        logger.error(
            "a step failed with %d requests under way, which fail: %s",
            len(failing),
            ", ".join(request.request_id for request in failing),
            exc_info=error,
        )
        news = StepError(f"a step failed: {type(error).__name__}: {error}")
        news.__cause__ = error
        for request in failing:  # they hear of it first, so that the abort is not taken for a normal end
            self._outbox.append((request, self._listening[request], news))
        self._forget(failing)

    def _send(self) -> None:
        """Hand over what a step brought: one wake-up for each event loop, not one for each increment."""
        outbox, self._outbox = self._outbox, []
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[_Arrivals, Increment | Exception]]] = {}
        mailboxes = {listener.loop: listener.mailbox for _, listener, _ in outbox}
        for _, listener, item in outbox:
            parcels.setdefault(listener.loop, []).append((listener.arrivals, item))
        for loop, parcel in parcels.items():
            try:
                loop.call_soon_threadsafe(mailboxes[loop].take, parcel)
            except RuntimeError:  # the loop is closed, so nobody listens any more
                self._forget([request for request, listener in list(self._listening.items()) if listener.loop is loop])
