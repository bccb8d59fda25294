"""The engine for asyncio: steps run on a thread of their own, results arrive in the event loop."""

import asyncio
import atexit
import concurrent.futures
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from mini_infer.config import EngineConfig
from mini_infer.engine.fork import OwnLock
from mini_infer.engine.intake import Prompt
from mini_infer.engine.llm_engine import LLMEngine
from mini_infer.engine.request import Request
from mini_infer.engine.stats import EngineSnapshot, EngineStats
from mini_infer.exceptions import EngineError, InvalidRequestError, MiniInferError, StepError
from mini_infer.outputs import Increment
from mini_infer.sampling import SamplingParams
from mini_infer.typing import TokenIds

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mini_infer.engine.tokenizer import Renderer, Tokenizer

T = TypeVar("T")

Observer: TypeAlias = Callable[[Request, Increment], None]
"""Told of every increment of every request, on the engine's thread."""

Run: TypeAlias = Callable[[Callable[[], list[Request]]], Awaitable[list[Request]]]
"""Has a function run on some other thread."""

SHUTDOWN_SECONDS = 30.0
"""How long ``shutdown`` waits for a step to end."""

_Arrivals: TypeAlias = "asyncio.Queue[Increment | Exception | None]"


_HANDFUL = 16
"""Increments handed over before an event loop may look after other things."""

_SHOWN_IDS = 20
"""Most request ids in one line of the log."""

_HOPELESS = 8
"""After so many failed steps in a row the device is taken to be broken."""


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
    Raises:
        MiniInferError: while it is iterated, if one of the requests cannot go on; the others are given up with it.
    """

    def __init__(self, requests: Seq[Request], listener: _Listener, engine: "AsyncLLMEngine") -> None:
        self.requests = requests
        self._listener = listener
        self._engine = engine  # which lives on as long as somebody listens
        self._num_open = len(requests)
        self._at_close: list[Callable[[], None]] = []
        self._is_closed = False

    async def __anext__(self) -> Increment:
        increment = None
        while increment is None:
            if self._num_open == 0:
                raise StopAsyncIteration
            increment = await self._listener.arrivals.get()
            self._num_open -= increment is None
        if isinstance(increment, Exception):
            self._num_open = 0
            raise increment
        if increment.finish_reason == "error":
            self._num_open = 0
            error = next(r.error for r in self.requests if r.request_id == increment.request_id)
            raise error or StepError(f"request {increment.request_id} could not go on")
        self._num_open -= increment.output is not None
        return increment

    def fail(self, error: Exception) -> None:
        """In the event loop: end with an error."""
        self._listener.arrivals.put_nowait(error)

    def drop_one(self) -> None:
        """In the event loop: one of the requests was never queued, and will not be."""
        self._listener.arrivals.put_nowait(None)

    def on_close(self, function: Callable[[], None]) -> None:
        """Have a function called once, when these are closed."""
        self._at_close.append(function)

    def close(self) -> None:
        """Nobody listens any more: abort what has not ended. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            for function in self._at_close:
                function()
            self._engine.forget(self.requests)

    def __enter__(self) -> "Increments":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncLLMEngine:
    """Generates for many concurrent tasks; all of them share each step.

    The event loop never waits for the model: it puts commands into an inbox, which the engine's thread empties between
    steps; all that a step brought comes back in one piece. An engine that nobody refers to any more is freed.

    Args:
        config, fields: as for ``LLMEngine``.
    """

    def __init__(self, config: EngineConfig | None = None, **fields: Any) -> None:
        self.engine = LLMEngine(config, **fields)
        self._thread = _EngineThread(self.engine)
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = WeakKeyDictionary()
        weakref.finalize(self, self._thread.stop)
        self._thread.start()

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def default_sampling_params(self) -> SamplingParams:
        return self.engine.default_sampling_params

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: true until ``shutdown``."""
        return self._thread.is_running

    @property
    def is_healthy(self) -> bool:
        """False once steps fail whatever is in them, as after an error of the device that does not go away."""
        return not self._thread.is_hopeless

    @property
    def step_seconds(self) -> float:
        """For how long the step under way has been running; 0 if there is none."""
        return self._thread.step_seconds

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.engine.tokenizer

    def tokenize(self, text: str) -> TokenIds:
        """As ``LLMEngine.tokenize``; on the caller's thread."""
        return self.engine.tokenize(text)

    def detokenize(self, token_ids: Seq[int]) -> str:
        """As ``LLMEngine.detokenize``; on the caller's thread."""
        return self.engine.detokenize(token_ids)

    def render_chat(self, messages: Seq[Mapping[str, Any]], /, **template_kwargs: Any) -> str:
        """As ``LLMEngine.render_chat``; on the caller's thread."""
        return self.engine.render_chat(messages, **template_kwargs)

    def render_with(self, renderer: "Renderer") -> None:
        """Have chat templates rendered elsewhere, by somebody who can end one that has no end."""
        self.engine.tokenizer.renderer = renderer

    async def stats(self) -> EngineStats:
        """As ``LLMEngine.stats``, between two steps."""
        return await self.call(LLMEngine.stats)

    async def snapshot(self) -> EngineSnapshot:
        """As ``LLMEngine.snapshot``, between two steps."""
        return await self.call(LLMEngine.snapshot)

    # ---- requests ------------------------------------------------------------------------------------------------

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[Increment]:
        """Complete one prompt, increment by increment; the last one carries the whole ``output``.

        Leaving the loop, or cancelling the task, aborts the request.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
            QueueFullError: ``max_waiting`` requests wait already.
            StepError: a step failed, twice, that this request was in.
            NotFiniteError: the model's logits were not numbers.
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
        increments = await self.prepare(prompts, sampling_params, request_ids=request_ids, priority=priority)
        try:
            await self.start(increments, increments.requests)
        except BaseException:  # above all a cancellation, which the command may or may not have preceded
            increments.close()
            raise
        return increments

    async def prepare(
        self,
        prompts: Seq[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        request_ids: Seq[str | None],
        priority: int = 0,
        run: Run = asyncio.to_thread,
    ) -> Increments:
        """Check one request per prompt, without queueing any: that is what ``start`` does.

        Args:
            run: where the work is done, which is above all the tokenizer's.

        The other arguments and the errors are those of ``submit``.
        """
        self._thread.check()
        loop = asyncio.get_running_loop()
        listener = _Listener(loop, self._mailboxes.setdefault(loop, _Mailbox()), asyncio.Queue())

        def requests() -> list[Request]:
            try:
                return [
                    self._thread.prepare(prompt, sampling_params, request_id, priority, listener)
                    for prompt, request_id in zip(prompts, request_ids, strict=True)
                ]
            except Exception:
                raise
            except BaseException as error:  # a panic in a tokenizer is none of Python's ordinary exceptions
                raise InvalidRequestError(
                    f"the tokenizer cannot read the prompt: {type(error).__name__}: {error}"
                ) from error

        return Increments(await run(requests), listener, self)

    def start(self, increments: Increments, requests: Seq[Request]) -> "Awaitable[None]":
        """Queue requests that ``prepare`` made, all or none of them; to be awaited for its errors.

        Raises:
            InvalidRequestError: an id is taken.
            QueueFullError: ``max_waiting`` requests wait already.
            MiniInferError: the engine was shut down.
        """
        return self.call(lambda engine: self._thread.enqueue(requests, increments._listener))

    def call(self, function: Callable[[LLMEngine], T]) -> "asyncio.Future[T]":
        """What a function of the engine returns or raises, run between two steps on the engine's thread.

        Raises:
            MiniInferError: the engine was shut down.
        """
        return asyncio.wrap_future(self._thread.put(function))

    def observe(self, observer: Observer) -> None:
        """Have an observer told of every increment from now on. It must be quick; one that raises is told no more."""
        self._thread.observers.append(observer)

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"; its iterator ends with what there is. Unknown ids are ignored: a request
        may finish while the command is on its way."""
        self._thread.put_quietly(lambda engine: self._thread.abort(request_id))

    def forget(self, requests: Seq[Request]) -> None:
        """Nobody waits for these requests any more: abort those that still run."""
        thread = self._thread  # not ``self``: a command must not keep the engine alive
        thread.put_quietly(lambda engine: thread.forget(requests))

    def shutdown(self, timeout: float = SHUTDOWN_SECONDS) -> bool:
        """Stop the thread; requests that have not ended fail with ``MiniInferError``. Safe to call twice.

        Args:
            timeout: seconds that the step under way may take. After that the thread is left to itself, and everybody
                who waits is told.

        Returns:
            Whether the thread has ended.
        """
        return self._thread.shut_down(timeout)

    async def __aenter__(self) -> "AsyncLLMEngine":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)


@dataclass(frozen=True, slots=True)
class _Command:
    """Something to do between two steps, and who waits for it."""

    function: Callable[[LLMEngine], Any]
    result: "concurrent.futures.Future[Any]"


class _EngineThread:
    """The thread that steps, and all that it touches. It knows nothing of who made it, who may thus be freed.

    Args:
        engine: what it steps.

    Attributes:
        observers: told of every increment.
        is_hopeless: steps fail whatever is in them.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self.observers: list[Observer] = []
        self.is_hopeless = False
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._lock = OwnLock()  # no command comes in after the thread was told to stop
        self._step_started: float | None = None
        # These are touched by the thread alone.
        self._listening: dict[Request, _Listener] = {}
        self._outbox: list[tuple[_Listener, Increment | Exception]] = []
        self._num_failed_steps = 0  # since the last one that did not
        self._thread = threading.Thread(target=self._work, name="mini-infer-engine", daemon=True)

    # ---- from other threads --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def step_seconds(self) -> float:
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def check(self) -> None:
        """Raise ``MiniInferError`` if nothing is done here any more."""
        self._lock.check()
        if self._stopping.is_set():
            raise _shut_down()

    def put(self, function: Callable[[LLMEngine], T]) -> "concurrent.futures.Future[T]":
        result: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            self.check()
            self._inbox.put(_Command(function, result))
        return result

    def put_quietly(self, function: Callable[[LLMEngine], None]) -> None:
        """Nobody waits for it, and after the end there is nothing to do."""
        with self._lock:
            if not self._stopping.is_set():
                self._inbox.put(_Command(function, concurrent.futures.Future()))

    def stop(self) -> None:
        """Have the thread end after the step under way, without waiting for it. The interpreter waits, when it ends:
        threads that compute must not outlive it."""
        if not self._stopping.is_set():
            atexit.register(self._thread.join, SHUTDOWN_SECONDS)
        self._stopping.set()
        self._inbox.put(_Command(lambda engine: None, concurrent.futures.Future()))  # wakes it if it is idle

    def shut_down(self, timeout: float) -> bool:
        with self._lock:
            self.stop()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        logger.critical("a step has not ended for %.0f seconds; its thread is left to itself", self.step_seconds)
        self._tell_everybody(_shut_down())
        return False

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        listener: _Listener,
    ) -> Request:
        """Make a request; this runs on any thread, but what the request then tells is told on the engine's."""

        def tell(increment: Increment) -> None:
            for observe in list(self.observers):
                try:
                    observe(request, increment)
                except Exception:
                    logger.exception("an observer failed; it is told no more")
                    self.observers.remove(observe)
            self._outbox.append((listener, increment))

        request = self._engine.make_request(prompt, params, request_id=request_id, priority=priority, listener=tell)
        return request

    # ---- on the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        reason: MiniInferError = _shut_down()
        try:
            while not self._stopping.is_set():
                if self._engine.is_finished():
                    self._execute(self._inbox.get())
                while not self._inbox.empty():
                    self._execute(self._inbox.get())
                self._step()
                self._send()
        except BaseException as error:  # a fault of this very loop
            logger.critical("the engine's thread ends: %s", error, exc_info=error)
            reason = MiniInferError(f"the engine's thread has died ({type(error).__name__}: {error}); make a new one")
        finally:
            with self._lock:
                self._stopping.set()
            self._tell_everybody(reason)
            self._execute(_Command(lambda engine: self.forget(list(self._listening)), concurrent.futures.Future()))

    def _execute(self, command: _Command) -> None:
        """Whatever a command raises is its caller's to know, and nobody else's."""
        if not command.result.set_running_or_notify_cancel():
            return
        try:
            command.result.set_result(command.function(self._engine))
        except BaseException as error:
            if not isinstance(error, MiniInferError):
                logger.error("a command failed: %s", error, exc_info=error)
            command.result.set_exception(error)

    def enqueue(self, requests: Seq[Request], listener: _Listener) -> None:
        queued: list[Request] = []
        try:
            for request in requests:
                self._engine.submit(request)
                queued.append(request)
                self._listening[request] = listener
        except BaseException:
            self.forget(queued)
            raise

    def forget(self, requests: Seq[Request]) -> None:
        for request in requests:
            self._listening.pop(request, None)
        self._engine.discard(requests)

    def abort(self, request_id: str) -> None:
        self._engine.discard([request for request in self._listening if request.request_id == request_id])

    def _step(self) -> None:
        """One step. One that fails is tried again, as nothing is lost by it, before those in it fail."""
        self._step_started = time.monotonic()
        try:
            _, num_tokens = self._engine.step()
            if num_tokens == 0 and self._num_failed_steps and not self._engine.is_finished():
                raise StepError("nothing went on after a step that failed")
        except BaseException as error:
            self._num_failed_steps += 1
            if self._num_failed_steps % 2:
                logger.warning("a step failed and is tried again: %s: %s", type(error).__name__, error)
            else:
                self._fail(error)
        else:
            if num_tokens:  # a step without any says nothing of the device
                self._num_failed_steps, self.is_hopeless = 0, False
        finally:
            self._step_started = None

    def _fail(self, error: BaseException) -> None:
        """A step raised twice. Which request is to blame cannot be told, so all that have begun fail; the others wait
        on. Whether it was one of them, or the device, shows in a request of our own."""
        begun = [request for request in self._listening if request.first_scheduled_time is not None]
        failing = begun or list(self._listening)  # so that a request which cannot even begin does not block the queue
        ids = [request.request_id for request in failing]
        logger.error(
            "a step failed with %d requests under way, which fail: %s",
            len(failing),
            ", ".join(ids[:_SHOWN_IDS] + ["..."] * (len(ids) > _SHOWN_IDS)),
            exc_info=error,
        )
        news = StepError(f"a step failed: {type(error).__name__}: {error}")
        news.__cause__ = error
        for request in failing:  # they hear of it first, so that the abort is not taken for a normal end
            self._outbox.append((self._listening[request], news))
        self.forget(failing)
        if self._num_failed_steps >= _HOPELESS or (self._engine.is_finished() and not self._can_step()):
            if not self.is_hopeless:
                logger.critical("steps fail whatever is in them: the device, or the engine, is broken")
            self.is_hopeless = True

    def _can_step(self) -> bool:
        ends: list[Increment] = []
        request = self._engine.make_request([0], SamplingParams(max_tokens=1), listener=ends.append)
        try:
            self._engine.submit(request)
            while not ends and self._engine.step()[1]:
                pass
        except BaseException:
            self._engine.discard([request])
        return bool(ends) and ends[-1].finish_reason in ("stop", "length")

    def _tell_everybody(self, reason: MiniInferError) -> None:
        """Whoever waits for a request or a command learns that it will not come. On any thread, as the engine's own may
        never come back, and holds the engine's lock then."""
        while not self._inbox.empty():
            command = self._inbox.get()
            if command.result.set_running_or_notify_cancel():
                command.result.set_exception(reason)
        _post([(listener, reason) for listener in list(self._listening.values())])

    def _send(self) -> None:
        """Hand over what a step brought."""
        outbox, self._outbox = self._outbox, []
        closed = _post(outbox)
        if closed:
            self.forget([request for request, listener in list(self._listening.items()) if listener.loop in closed])


def _post(items: Seq[tuple[_Listener, Increment | Exception]]) -> set[asyncio.AbstractEventLoop]:
    """Hand items over: one wake-up for each event loop, not one for each item. Returns loops that are closed, in which
    nobody listens any more."""
    parcels: dict[asyncio.AbstractEventLoop, list[tuple[_Arrivals, Increment | Exception]]] = {}
    mailboxes = {listener.loop: listener.mailbox for listener, _ in items}
    for listener, item in items:
        parcels.setdefault(listener.loop, []).append((listener.arrivals, item))
    closed = set()
    for loop, parcel in parcels.items():
        try:
            loop.call_soon_threadsafe(mailboxes[loop].take, parcel)
        except RuntimeError:
            closed.add(loop)
    return closed


def _shut_down() -> EngineError:
    return EngineError("the engine was shut down; make a new one")
