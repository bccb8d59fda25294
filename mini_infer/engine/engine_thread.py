"""The thread that an asynchronous engine steps on, and how what it finds gets into event loops."""

import asyncio
import atexit
import concurrent.futures
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from mini_infer.engine.fork import OwnLock
from mini_infer.engine.intake import Prompt
from mini_infer.engine.llm_engine import LLMEngine
from mini_infer.engine.request import Request
from mini_infer.exceptions import EngineError, MiniInferError, RankError, StepError
from mini_infer.outputs import Increment
from mini_infer.sampling import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")

Observer: TypeAlias = Callable[[Request, Increment], None]
"""Told of every increment of every request, on the engine's thread."""

Arrivals: TypeAlias = "asyncio.Queue[Increment | Exception | None]"
"""What somebody who listens has yet to take; None stands for a request that will not be queued."""

SHUTDOWN_SECONDS = 30.0
"""How long ``shutdown`` waits for a step to end."""

_HANDFUL = 16
"""Increments handed over before an event loop may look after other things."""

_SHOWN_IDS = 20
"""Most request ids in one line of the log."""

_HOPELESS = 8
"""After so many failed steps in a row the device is taken to be broken."""


class Mailbox:
    """Increments on their way into one event loop: in order, and never so many at once that they hold it up."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Arrivals, Increment | Exception]] = deque()

    def take(self, parcel: Seq[tuple[Arrivals, Increment | Exception]]) -> None:
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
class Listener:
    """Where a request's increments go: a queue in somebody's event loop."""

    loop: asyncio.AbstractEventLoop
    mailbox: Mailbox
    arrivals: Arrivals


@dataclass(frozen=True, slots=True)
class _Command:
    """Something to do between two steps, and who waits for it."""

    function: Callable[[LLMEngine], Any]
    result: "concurrent.futures.Future[Any]"


class EngineThread:
    """The thread that steps, and all that it touches. It knows nothing of who made it, who may thus be freed.

    Args:
        engine: what it steps.

    Attributes:
        observers: told of every increment.
        is_hopeless: steps fail whatever is in them.
        failure: why it ended, if nobody asked for that.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self.observers: list[Observer] = []
        self.is_hopeless = False
        self.failure: MiniInferError | None = None
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._lock = OwnLock()  # no command comes in after the thread was told to stop
        self._step_started: float | None = None
        # These are touched by the thread alone.
        self._listening: dict[Request, Listener] = {}
        self._outbox: list[tuple[Listener, Increment | Exception]] = []
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
            raise self.failure or shut_down_error()

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
        self._tell_everybody(shut_down_error())
        return False

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        caller: Hashable,
        listener: Listener,
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

        request = self._engine.make_request(
            prompt, params, request_id=request_id, priority=priority, caller=caller, listener=tell
        )
        return request

    # ---- on the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        reason: MiniInferError = shut_down_error()
        try:
            while not self._stopping.is_set():
                if self._engine.is_finished():
                    self._execute(self._inbox.get())
                while not self._inbox.empty():
                    self._execute(self._inbox.get())
                self._step()
                self._send()
        except RankError as error:
            logger.critical("the engine ends: %s", error)
            reason = self.failure = error
        except BaseException as error:  # a fault of this very loop
            logger.critical("the engine's thread ends: %s", error, exc_info=error)
            reason = MiniInferError(f"the engine's thread has died ({type(error).__name__}: {error}); make a new one")
            self.failure = reason
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

    def enqueue(self, requests: Seq[Request], listener: Listener) -> None:
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
        except RankError:
            raise  # what computes has died, and every step would say the same
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


def _post(items: Seq[tuple[Listener, Increment | Exception]]) -> set[asyncio.AbstractEventLoop]:
    """Hand items over: one wake-up for each event loop, not one for each item. Returns loops that are closed, in which
    nobody listens any more."""
    parcels: dict[asyncio.AbstractEventLoop, list[tuple[Arrivals, Increment | Exception]]] = {}
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


def shut_down_error() -> EngineError:
    return EngineError("the engine was shut down; make a new one")
