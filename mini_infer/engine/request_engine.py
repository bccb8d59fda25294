"""Requests in, steps, outputs out: an engine as its faces drive it, one request at a time."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from mini_infer.compat.step import SignedStep, signed_step
from mini_infer.config import EngineConfig
from mini_infer.engine.build import Parts
from mini_infer.engine.fork import OwnLock
from mini_infer.engine.intake import Prompt
from mini_infer.engine.loop import CLOSED, StepObserver, StepResult
from mini_infer.engine.request import Request
from mini_infer.engine.stats import EngineSnapshot, EngineStats, loops_of
from mini_infer.exceptions import EngineError, InvalidRequestError, QueueFullError
from mini_infer.outputs import GenerateOutput, Increment
from mini_infer.sampling import SamplingParams

if TYPE_CHECKING:
    import torch

    from mini_infer.models import ModelConfig

_Engine = TypeVar("_Engine", bound="RequestEngine")

_KEPT_OUTPUTS = 256
"""Outputs that `step` handed over and `get_output` still finds; no more, so that a loop of `step` stays small."""


class RequestEngine:
    """Queues requests, runs steps, and keeps outputs until they are fetched.

    Args:
        config: what it was made from.
        parts: what it consists of.
    """

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self.config = config
        self.max_model_len = parts.max_model_len
        self.default_sampling_params = parts.defaults.sampling
        self._parts = parts
        self._tokenizer = parts.tokenizer
        self._intake = parts.intake
        self._loop = parts.loop
        self._finished = parts.loop.finished  # whose output nobody has fetched
        self._handed_over: OrderedDict[str, GenerateOutput] = OrderedDict()  # the last ones that `step` gave
        self._lock = OwnLock()

    @property
    def model_config(self) -> "ModelConfig":
        """What the checkpoint says of itself.

        Raises:
            EngineError: there is no checkpoint behind this engine's executor.
        """
        if self._parts.model_config is None:
            raise EngineError("this engine's executor was made elsewhere, and has no checkpoint that it knows of")
        return self._parts.model_config

    @property
    def device(self) -> "torch.device":
        """Where the model is; raises as ``model_config`` does."""
        if self._parts.device is None:
            raise EngineError("this engine's executor was made elsewhere, and has no device that it knows of")
        return self._parts.device

    def close(self) -> None:
        """Abort what runs, and free the model and the KV memory. Safe to call twice. Nothing can be queued then."""
        with self._lock:
            for request in list(self._loop.requests.values()):
                self._loop.abort(request)
            self._parts = replace(self._parts, executor=CLOSED)
            self._loop.close()

    def __enter__(self: _Engine) -> _Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- one request at a time -----------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        max_tokens: int | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request and return its id; ``step`` or ``get_output`` move it along.

        Args:
            prompt: text or token ids.
            sampling_params: None is the model's own default, 100 tokens at most.
            max_tokens: overrides ``sampling_params``.
            request_id: a name of your own; None makes one.
            priority: higher goes first, with ``scheduling_policy="priority"``.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
            QueueFullError: ``max_waiting`` requests wait already.
        """
        request = self._intake.make_request(
            prompt, sampling_params, {"max_tokens": max_tokens}, request_id=request_id, priority=priority
        )
        self.submit(request)
        return request.request_id

    def get_output(self, request_id: str) -> GenerateOutput | None:
        """The output of a request once it has finished, else None after running one step.

        A finished output is handed over once.

        Raises:
            InvalidRequestError: no such request, or its output was handed over already.
        """
        with self._lock:
            if isinstance(request_id, str) and request_id in self._loop.requests:
                self._advance()
            elif isinstance(request_id, str) and request_id in self._handed_over:
                return self._handed_over.pop(request_id)
            elif not isinstance(request_id, str) or request_id not in self._finished:
                raise InvalidRequestError(
                    f"request_id {request_id!r} is unknown, or its output was handed over already; "
                    "use an id that add_request returned"
                )
            request = self._finished.pop(request_id, None)
            return None if request is None else request.output()

    def step(self) -> SignedStep:
        """Run one step.

        Returns:
            ``(request_id, token_ids)`` of each request that finished, and so is handed over (the tokens are those of
            its first completion; ``get_output`` still has the rest, of the last 256), and the number of tokens
            computed, negative for a step that only decoded.
        """
        with self._lock:
            result = self._advance()
            finished = [request.output() for request in result.finished]
            self._hand_over(finished)
            for output in finished:
                self._finished.pop(output.request_id, None)
            return signed_step(finished, result.plan.num_tokens, result.plan.only_decodes)

    def _hand_over(self, outputs: Seq[GenerateOutput]) -> None:
        """Keep outputs that are somebody's already, or that nobody need ask for, as long as few others follow."""
        self._handed_over |= {output.request_id: output for output in outputs}
        while len(self._handed_over) > _KEPT_OUTPUTS:
            self._handed_over.popitem(last=False)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do for ``step``."""
        return self._loop.is_finished()

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"; its output holds what was generated so far.

        Aborting a request that has just finished does nothing.

        Raises:
            InvalidRequestError: no such request, or its output was handed over already.
        """
        with self._lock:
            request = self._loop.requests.get(request_id) if isinstance(request_id, str) else None
            if request is not None:
                self._loop.abort(request)
                if request_id in self._finished:
                    self._hand_over([request.output()])
                    del self._finished[request_id]
            elif not isinstance(request_id, str) or request_id not in {*self._finished, *self._handed_over}:
                raise InvalidRequestError(f"request_id {request_id!r} is unknown; nothing to abort")

    def stats(self) -> EngineStats:
        """Queue lengths, KV blocks, and totals since the start."""
        with self._lock:
            return EngineStats.of(self._loop)

    def stats_per_replica(self) -> list[EngineStats]:
        """The same of each replica of the model."""
        with self._lock:
            return [EngineStats.of(loop) for loop in loops_of(self._loop)]

    def snapshot(self) -> EngineSnapshot:
        """Who runs, who waits, and which blocks they hold."""
        with self._lock:
            return EngineSnapshot.of(self._loop)

    # ---- prepared requests, for faces that listen ----------------------------------------------------------------

    def make_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        caller: Hashable = None,
        listener: Callable[[Increment], None] | None = None,
    ) -> Request:
        """Check a request and prepare it, without queueing it; may run on any thread while a step runs on another.

        Args:
            caller: who asks; while others do, too, no caller takes more than a share of the seats and of each step.
            listener: told of every increment, on the thread that runs the step. Such a request's output comes with
                its last increment, not through ``get_output``.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
        """
        return self._intake.make_request(
            prompt, sampling_params, {}, request_id=request_id, priority=priority, caller=caller, listener=listener
        )

    def submit(self, request: Request) -> None:
        """Queue a request that ``make_request`` prepared.

        Raises:
            InvalidRequestError: its id is taken by a request whose output is still to come or to be fetched.
            QueueFullError: ``max_waiting`` requests wait already.
        """
        with self._lock:
            limit = self.config.max_waiting
            if limit is not None and (waiting := self._loop.num_waiting_requests) >= limit:
                raise QueueFullError(f"{waiting} requests wait already and max_waiting is {limit}; try again later")
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        if request.request_id in self._loop.requests or request.request_id in self._finished:
            raise InvalidRequestError(f"request_id {request.request_id!r} is taken; choose another or fetch its output")
        self._handed_over.pop(request.request_id, None)
        self._loop.enqueue(request)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def watch(self, observer: StepObserver) -> None:
        """Have somebody told of every step from now on, on the thread that runs it."""
        with self._lock:
            for loop in loops_of(self._loop):
                loop.watch(observer)

    def _advance(self) -> StepResult:
        with self._lock:
            return self._loop.advance()

    def discard(self, requests: Seq[Request]) -> None:
        """Forget requests that nobody waits for any more, wherever they are."""
        with self._lock:
            for request in requests:
                if self._loop.requests.get(request.request_id) is request:
                    self._loop.abort(request)
                if self._finished.get(request.request_id) is request:
                    del self._finished[request.request_id]
