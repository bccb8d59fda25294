"""The loop: plan, submit, read, commit, publish. One call of ``advance`` reads one step.

With a depth of 1 a step is planned, computed and read before the next one is planned. With a greater depth, up to so
many steps are under way, so that the device need not wait for the host:

    host      plan 1, 2 | read 1 . plan 3 | read 2 . plan 4 | read 3 . ...
    device      step 1 ------> step 2 ------> step 3 ------> step 4

A step is planned before the tokens of the one before it are known: each sequence is taken to go on, and its next token
has a placeholder. On the device the token is there in time. The host sees it later, so a sequence may turn out to have
ended, by a stop token, a stop string or an abort, with steps under way: what these draw for it is dropped. Blocks are
given back as soon as the host knows that they are not needed: whoever gets them next writes in a later step, and steps
are computed in their order.

Everything that is certain happens in ``commit``, all of it or none, before anybody is told. What is told afterwards,
text, stop strings and listeners, concerns one request at a time: if that raises, this request ends, and no other.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from mini_infer.engine.describe import Answer, Describer, Wanted
from mini_infer.engine.request import Request
from mini_infer.exceptions import EngineError, RequestError
from mini_infer.interrupts import uninterrupted
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Outcome, Scheduler, SchedulerOutputs
from mini_infer.step import Executor, ExecutorRestarted, StepFuture, StepInput, StepOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Flight:
    """A step under way.

    Attributes:
        plan: who runs.
        requests: whose each of its sequences is.
        wanted: what they want of it.
        step: what was submitted.
        future: its result, sooner or later.
    """

    plan: SchedulerOutputs
    requests: list[Request]
    wanted: Wanted
    step: StepInput
    future: StepFuture


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Attributes:
        plan: who ran.
        finished: requests that ended in it.
        num_generated_tokens: how many it gave to requests that were still interested.
    """

    plan: SchedulerOutputs
    finished: list[Request]
    num_generated_tokens: int = 0


class _WantError(Exception):
    """A request raised while it said what it wants of a step: a rule of its own, for example."""

    def __init__(self, request: Request, error: Exception) -> None:
        super().__init__(request.request_id)
        self.request, self.error = request, error


@dataclass(slots=True)
class LoopCounts:
    """Totals since the start: steps, tokens computed in prompt chunks, those computed one at a time, tokens sampled."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_decode_tokens: int = 0
    num_generated_tokens: int = 0

    @classmethod
    def total(cls, counts: "Iterable[LoopCounts]") -> "LoopCounts":
        """Of several loops."""
        return cls(*map(sum, zip(*map(astuple, counts), strict=True)))


class StepObserver:
    """Watches the loop from outside; a trace does. It must raise nothing. This one does nothing."""

    def arrived(self, request: Request) -> None:
        """A request was queued."""

    def planned(self, plan: SchedulerOutputs, began: int) -> None:
        """A step was planned; before that, ``time.perf_counter_ns`` was ``began``."""

    def submitted(self, flight: Flight) -> None:
        """It was handed to the executor."""

    def computed(self, flight: Flight, output: StepOutput) -> None:
        """Its result is there."""

    def committed(self, flight: Flight, result: StepResult) -> None:
        """Everybody was told of it."""

    def rewound(self, plans: list[SchedulerOutputs], error: BaseException) -> None:
        """Steps failed, and what they planned never came to be."""

    def ended(self, request: Request) -> None:
        """A request has finished, or was ended; perhaps in the middle of publishing a step."""

    def closed(self) -> None:
        """The engine was closed."""


class _Closed:
    """What is left of an executor."""

    def submit(self, step: StepInput, /) -> StepFuture:
        raise EngineError("the engine was closed; make a new one")

    def close(self) -> None:
        pass


CLOSED: Executor = _Closed()


class EngineLoop:
    """Moves all requests along, one step at a time.

    Args:
        scheduler: decides who runs.
        executor: computes.
        describer: makes steps of plans, in the terms of that executor.
        depth: most steps under way.
        observers: are told of every step.

    Attributes:
        requests: under way, by their ids.
        finished: those that have ended and that nobody listened to, until somebody takes them out.
        flights: the steps under way, the oldest first.
        counts: totals since the start.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        describer: Describer,
        depth: int,
        observers: tuple[StepObserver, ...] = (),
    ) -> None:
        self.scheduler = scheduler
        self.requests: dict[str, Request] = {}
        self.finished: dict[str, Request] = {}
        self.counts = LoopCounts()
        self._executor = executor
        self._describer = describer
        self._depth = depth
        self._observers = observers
        self.flights: deque[Flight] = deque()
        self._waiting: set[Request] = set()
        self._unhurried: set[Request] = set()
        self._is_publishing = False
        self._held_back: BaseException | None = None

    @property
    def num_waiting_requests(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do for ``advance``."""
        return not self.requests

    def enqueue(self, request: Request) -> None:
        """Queue a request's first sequences.

        Raises:
            EngineError: the engine was closed.
        """
        if self._executor is CLOSED:
            raise EngineError("the engine was closed; make a new one")
        with uninterrupted():
            request.decoding.start(self.scheduler)
            self.requests[request.request_id] = request
            self._waiting.add(request)
            if request.decoding.needs_last_token:
                self._unhurried.add(request)
            for observer in self._observers:
                observer.arrived(request)

    def close(self) -> None:
        """Let go of the executor, even of one that fails to close; what is under way is dropped."""
        self.flights.clear()
        executor, self._executor = self._executor, CLOSED
        try:
            executor.close()
        finally:
            for observer in self._observers:
                observer.closed()

    def abort(self, request: Request) -> None:
        """End a request, wherever it is; its listener is told."""
        with uninterrupted():
            self._stop(request, "abort")
            if not self._is_publishing:
                self._raise_held_back()

    def advance(self) -> StepResult:
        """Read one step, with those that follow it under way.

        If it fails nothing is lost: the requests are as they were before it, and the next call tries again.

        Raises:
            EngineError: a listener called this.
            RankError: what computes has died, and will not come back.
            Exception: whatever the executor raised.
        """
        if self._is_publishing:
            raise EngineError("a listener cannot run steps, since it is told in the middle of one; queue what it needs")
        failed = self.launch()
        if not self.flights:
            return StepResult(SchedulerOutputs(), failed)
        flight = self.flights[0]
        try:
            output = flight.future.result()
            answers = list(flight.wanted.answers(output))
        except BaseException as error:
            with uninterrupted():
                self._rewind([flight.plan for flight in self.flights], error)
                if isinstance(error, ExecutorRestarted):
                    self.scheduler.lose_cache()
                    return StepResult(SchedulerOutputs(), failed)
            if isinstance(error, Exception) and not any(map(self._is_alive, flight.requests)):
                logger.warning("a step failed in which nobody was interested any more: %r", error)
                return StepResult(SchedulerOutputs(), failed)
            raise
        with uninterrupted():
            result = self._land(flight, output, answers, failed)
            self._raise_held_back()
            return result

    def launch(self) -> list[Request]:
        """Have as many steps under way as may be. Returns the requests that failed; raises as ``advance``."""
        with uninterrupted():
            try:
                return self._fill()
            except ExecutorRestarted:
                self.scheduler.lose_cache()
                return []

    def watch(self, observer: StepObserver) -> None:
        """Have one more observer told of every step."""
        self._observers = (*self._observers, observer)

    # ---- before a step -------------------------------------------------------------------------------------------

    def _fill(self) -> list[Request]:
        """Submit steps until as many are under way as may be, or there is nothing to compute now. Returns the requests
        that failed."""
        failed: list[Request] = []
        depth = 1 if self._unhurried else self._depth
        while len(self.flights) < depth:
            began = time.perf_counter_ns()
            plan = self.scheduler.schedule()
            if plan.is_empty:
                break
            for observer in self._observers:
                observer.planned(plan, began)
            try:
                flight = self._submit(plan)
            except BaseException as error:
                self._rewind([*(flight.plan for flight in self.flights), plan], error)
                if not isinstance(error, _WantError):
                    raise
                self._fail(error.request, error.error)
                failed.append(error.request)
                continue
            self.flights.append(flight)
            for observer in self._observers:
                observer.submitted(flight)
        return failed

    def _submit(self, plan: SchedulerOutputs) -> Flight:
        now = time.monotonic()
        wanted = Wanted()
        requests = []
        first_row = 0
        for item in plan.scheduled:
            request = self.requests[item.sequence.request_id]
            if request.first_scheduled_time is None:
                request.first_scheduled_time = now
                request.num_cached_tokens = item.start
                self._waiting.discard(request)
            try:
                request.decoding.want(request, item, first_row, wanted)
            except Exception as error:
                raise _WantError(request, error) from error
            wanted.end_sequence()
            requests.append(request)
            first_row += item.num_rows
        step = self._describer.describe(plan, wanted)
        return Flight(plan, requests, wanted, step, self._executor.submit(step))

    def _rewind(self, plans: list[SchedulerOutputs], error: BaseException) -> None:
        """A step failed, and with it those that build on it."""
        self.flights.clear()
        self.scheduler.rewind(plans)
        self._describer.forget()
        for observer in self._observers:
            observer.rewound(plans, error)

    # ---- after a step --------------------------------------------------------------------------------------------

    def _land(self, flight: Flight, output: StepOutput, answers: list[Answer], finished: list[Request]) -> StepResult:
        """Commit a step, and tell of it. ``finished`` are requests that ended before it."""
        for observer in self._observers:
            observer.computed(flight, output)
        outcomes: list[Outcome] = []
        failed: dict[Request, Exception] = {}
        for item, request, answer in zip(flight.plan.scheduled, flight.requests, answers, strict=True):
            try:
                if self._is_alive(request):
                    outcomes += request.decoding.decide(request, item, answer)
            except Exception as error:
                failed.setdefault(request, error)
        try:
            self.scheduler.commit(outcomes)
        except ValueError as error:
            self._rewind([flight.plan for flight in self.flights], error)
            raise
        self.flights.popleft()
        self._count(flight.plan)
        ended, num_generated = self._publish(flight, answers, failed)
        result = StepResult(flight.plan, [*finished, *ended], num_generated)
        for observer in self._observers:
            observer.committed(flight, result)
        return result

    def _publish(
        self, flight: Flight, answers: list[Answer], failed: dict[Request, Exception]
    ) -> tuple[list[Request], int]:
        """Tell of a step whose outcomes are committed, save of those that failed.

        Returns:
            The requests that ended, and how many tokens were generated.
        """
        now = time.monotonic()
        finished, num_generated = list(failed), 0
        self._is_publishing = True
        try:
            for request, cause in failed.items():
                self._fail(request, cause)
            for item, request, answer in zip(flight.plan.scheduled, flight.requests, answers, strict=True):
                if self._is_alive(request):
                    if request.first_token_time is None and item.num_logits:
                        request.first_token_time = now
                    try:
                        num_generated += request.decoding.publish(request, item, answer, self.scheduler)
                    except BaseException as error:
                        self._fail(request, error)
                    if request.finished:
                        self._retire(request)
                        finished.append(request)
        finally:
            self._is_publishing = False
            self.counts.num_generated_tokens += num_generated
        return finished, num_generated

    def _fail(self, request: Request, error: BaseException) -> None:
        """Something that concerns one request alone has raised: it ends."""
        self._blame(request, error)
        self._stop(request, "error")

    def _blame(self, request: Request, error: BaseException) -> None:
        """Keep an error with the request that it is about. One that asks the program to end also goes to the caller,
        once all others have been told of the step."""
        logger.error("request %s ends with an error", request.request_id, exc_info=error)
        if request.error is None:
            request.error = RequestError(f"request {request.request_id!r} failed: {type(error).__name__}: {error}")
            request.error.__cause__ = error
        if not isinstance(error, Exception):
            self._held_back = self._held_back or error

    def _raise_held_back(self) -> None:
        error, self._held_back = self._held_back, None
        if error is not None:
            raise error

    def _stop(self, request: Request, reason: FinishReason) -> None:
        for _ in range(len(request.completions) + 1):  # the listener is told of each of them, and may raise each time
            try:
                request.decoding.stop(request, self.scheduler, reason)
                break
            except BaseException as error:
                self._blame(request, error)
                reason = "error"
        for completion in request.completions:
            if completion.finish_reason is None:  # the rest of its text cannot be read, however often one tries
                completion.finish_reason = reason
                try:
                    request.emit(completion, "", 0)
                except BaseException as error:
                    self._blame(request, error)
        self._retire(request)

    def _retire(self, request: Request) -> None:
        if self._is_alive(request):
            request.finished_time = time.monotonic()
            del self.requests[request.request_id]
            self._waiting.discard(request)
            self._unhurried.discard(request)
            if request.listener is None:
                self.finished[request.request_id] = request
            request.listener = None  # which may refer to the request, and nobody but the collector would free the two
            for observer in self._observers:
                observer.ended(request)

    def _is_alive(self, request: Request) -> bool:
        """Whether it is still under way; its id may belong to another by now."""
        return self.requests.get(request.request_id) is request

    def _count(self, plan: SchedulerOutputs) -> None:
        num_decode_tokens = sum(item.num_rows for item in plan.scheduled if item.is_decode)
        self.counts.num_steps += 1
        self.counts.num_decode_tokens += num_decode_tokens
        self.counts.num_prompt_tokens += plan.num_tokens - num_decode_tokens
