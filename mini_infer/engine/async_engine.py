"""The engine for asyncio: steps run on a thread of their own, results arrive in the event loop."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from collections.abc import Sequence as Seq
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from mini_infer.config import EngineConfig
from mini_infer.engine.engine_thread import SHUTDOWN_SECONDS, EngineThread, Listener, Mailbox, Observer
from mini_infer.engine.intake import Prompt
from mini_infer.engine.llm_engine import LLMEngine
from mini_infer.engine.request import Request
from mini_infer.engine.stats import EngineSnapshot, EngineStats
from mini_infer.exceptions import InvalidRequestError, MiniInferError, StepError
from mini_infer.outputs import Increment
from mini_infer.sampling import SamplingParams
from mini_infer.typing import TokenIds

if TYPE_CHECKING:
    from mini_infer.engine.tokenizer import Renderer, Tokenizer

T = TypeVar("T")

Run: TypeAlias = Callable[[Callable[[], list[Request]]], Awaitable[list[Request]]]
"""Has a function run on some other thread."""


class Increments(AsyncIterator[Increment]):
    """What the steps add to some requests, as it comes; the last increment of each carries its whole ``output``.

    A context manager: requests that have not ended when it is left are aborted.

    Attributes:
        requests: whose increments these are, in the order of their prompts.
    Raises:
        MiniInferError: while it is iterated, if one of the requests cannot go on; the others are given up with it.
    """

    def __init__(self, requests: Seq[Request], listener: Listener, engine: "AsyncLLMEngine") -> None:
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
            try:
                raise increment
            finally:
                del increment  # or else the error would refer to itself
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
            while self._at_close:  # they may refer to these
                self._at_close.pop()()
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
        self._thread = EngineThread(self.engine)
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()
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
    def failure(self) -> MiniInferError | None:
        """Why it takes no requests any more, if nobody shut it down."""
        return self._thread.failure

    @property
    def step_seconds(self) -> float:
        """For how long the step under way has been running; 0 if there is none."""
        return self._thread.step_seconds

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.engine.tokenizer

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        """As ``LLMEngine.tokenize``; on the caller's thread."""
        return self.engine.tokenize(text, add_special_tokens=add_special_tokens)

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

    async def stats_per_replica(self) -> list[EngineStats]:
        """As ``LLMEngine.stats_per_replica``, between two steps."""
        return await self.call(LLMEngine.stats_per_replica)

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
        caller: Hashable = None,
        run: Run = asyncio.to_thread,
    ) -> Increments:
        """Check one request per prompt, without queueing any: that is what ``start`` does.

        Args:
            caller: who asks; while others do, too, no caller takes more than a share of the seats and of each step.
            run: where the work is done, which is above all the tokenizer's.

        The other arguments and the errors are those of ``submit``.
        """
        self._thread.check()
        loop = asyncio.get_running_loop()
        listener = Listener(loop, self._mailboxes.setdefault(loop, Mailbox()), asyncio.Queue())

        def requests() -> list[Request]:
            try:
                return [
                    self._thread.prepare(prompt, sampling_params, request_id, priority, caller, listener)
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
