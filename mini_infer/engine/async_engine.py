"""The engine for asyncio: steps run on a thread of their own, results arrive in the event loop."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, TypeAlias

from mini_infer.config import EngineConfig
from mini_infer.engine.intake import Prompt
from mini_infer.engine.llm_engine import LLMEngine
from mini_infer.engine.request import Request
from mini_infer.exceptions import MiniInferError
from mini_infer.outputs import StepOutput
from mini_infer.sampling import SamplingParams

logger = logging.getLogger(__name__)

_Deliver: TypeAlias = Callable[[StepOutput | Exception], None]


class AsyncLLMEngine:
    """Generates for many concurrent tasks; all of them share each step.

    The event loop never waits for the model: it puts commands into an inbox, which the engine's thread empties between
    steps, and increments come back through the loop's own queue.

    Args:
        config, fields: as for ``LLMEngine``.
    """

    def __init__(self, config: EngineConfig | None = None, **fields: Any) -> None:
        self.engine = LLMEngine(config, **fields)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listening: dict[Request, _Deliver] = {}  # touched by the engine's thread alone
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no command comes in after the thread was told to stop
        self._thread = threading.Thread(target=self._work, name="mini-infer-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[StepOutput]:
        """Complete one prompt, increment by increment; the last one carries the whole ``output``.

        Leaving the loop, or cancelling the task, aborts the request.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
            QueueFullError: ``max_waiting`` requests wait already.
            MiniInferError: the engine was shut down.
        """
        loop = asyncio.get_running_loop()
        increments: asyncio.Queue[StepOutput | Exception] = asyncio.Queue()

        def deliver(item: StepOutput | Exception) -> None:
            try:
                loop.call_soon_threadsafe(increments.put_nowait, item)
            except RuntimeError:  # the loop is closed, so nobody listens any more
                self._inbox.put(lambda: self._forget(request))

        request = await asyncio.to_thread(
            self.engine.make_request, prompt, sampling_params, request_id=request_id, listener=deliver
        )
        with self._lock:
            if self._stopping.is_set():
                raise MiniInferError("the engine was shut down; make a new one")
            self._inbox.put(lambda: self._submit(request, deliver))
        try:
            while True:
                increment = await increments.get()
                if isinstance(increment, Exception):
                    raise increment
                yield increment
                if increment.output is not None:
                    return
        finally:
            self._inbox.put(lambda: self._forget(request))

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
                # Which request is to blame cannot be told, so all that were under way fail; new ones are served.
                logger.exception("a step failed; %d requests fail with it", len(self._listening))
                for request, deliver in list(self._listening.items()):
                    deliver(error)  # first, so that it is not taken for a normal end
                    self._forget(request)
        while not self._inbox.empty():  # requests that came in last are aborted as well, not left waiting
            self._inbox.get()()
        for request in list(self._listening):
            self._forget(request)

    def _submit(self, request: Request, deliver: _Deliver) -> None:
        try:
            self.engine.submit(request)
        except Exception as error:
            deliver(error)
        else:
            self._listening[request] = deliver

    def _forget(self, request: Request) -> None:
        """Nobody waits for this request any more: abort it if it still runs."""
        self._listening.pop(request, None)
        self.engine.discard([request])
