"""Executors around an engine's own, which watch its steps, fail them, corrupt or delay them.

An engine and its executor exchange plain data, so whatever can go wrong with a device can be had here, at the seam.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from mini_infer import LLMEngine
from mini_infer.executor.queue import InlineExecutor, ThreadExecutor
from mini_infer.executor.runner import ModelRunner
from mini_infer.step import Executor, StepFuture, StepInput, StepOutput, TokenScore

E = TypeVar("E", bound=Executor)

NAN = float("nan")

PATIENCE = 60.0
"""Seconds until a test that waits in vain fails instead."""


def interpose(engine: LLMEngine, wrap: Callable[[Executor], E]) -> E:
    """Put an executor around an engine's own, while nothing is under way; the new one."""
    wrapped = engine._loop._executor = wrap(engine._loop._executor)
    return wrapped


def runner_of(engine: LLMEngine) -> ModelRunner:
    """What computes an engine's steps in the end."""
    executor = engine._loop._executor
    while isinstance(executor, Passing):
        executor = executor.inner
    assert isinstance(executor, InlineExecutor | ThreadExecutor)
    runner = executor._run.__self__  # type: ignore[attr-defined]
    assert isinstance(runner, ModelRunner)
    return runner


class Passing:
    """Passes every step on."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner

    def submit(self, step: StepInput, /) -> StepFuture:
        return self.inner.submit(step)

    def close(self) -> None:
        self.inner.close()


class Gate(Passing):
    """Lets steps through while it is open; whoever has its first step has begun when ``was_reached``."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.is_open, self.was_reached = threading.Event(), threading.Event()

    def submit(self, step: StepInput, /) -> StepFuture:
        self.was_reached.set()
        assert self.is_open.wait(PATIENCE)
        return self.inner.submit(step)


class Counting(Passing):
    """Numbers the steps, for those that do something at some of them."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.num_steps = 0

    def submit(self, step: StepInput, /) -> StepFuture:
        number, self.num_steps = self.num_steps, self.num_steps + 1
        return self.nth(number, step)

    def nth(self, number: int, step: StepInput) -> StepFuture:
        return self.inner.submit(step)


@dataclass
class Then:
    """A step, and what is done with its result when that is read."""

    future: StepFuture
    then: Callable[[StepOutput], StepOutput]

    def result(self) -> StepOutput:
        return self.then(self.future.result())


@dataclass
class Failed:
    """A step that raises."""

    error: BaseException

    def result(self) -> StepOutput:
        raise self.error


class Failing(Counting):
    """Fails steps, before they are computed.

    Args:
        error_of: what a step raises, by its number and itself; None lets it be.
        when_submitted: raise at once, rather than when the result is read.
    """

    def __init__(
        self,
        inner: Executor,
        error_of: Callable[[int, StepInput], BaseException | None],
        when_submitted: bool = False,
    ) -> None:
        super().__init__(inner)
        self._error_of, self._when_submitted = error_of, when_submitted

    def nth(self, number: int, step: StepInput) -> StepFuture:
        error = self._error_of(number, step)
        if error is None:
            return self.inner.submit(step)
        if self._when_submitted:
            raise error
        return Failed(error)


class Corrupting(Counting):
    """Changes what steps give.

    Args:
        change: the output instead, by the step's number, the step and its output.
    """

    def __init__(self, inner: Executor, change: Callable[[int, StepInput, StepOutput], StepOutput]) -> None:
        super().__init__(inner)
        self._change = change

    def nth(self, number: int, step: StepInput) -> StepFuture:
        return Then(self.inner.submit(step), lambda output: self._change(number, step, output))


def with_nan(output: StepOutput, place: int) -> StepOutput:
    """What an executor gives where the logits of one draw, or else of one scored row, are not finite."""
    if output.logprobs:
        logprobs = list(output.logprobs)
        logprobs[place] = NAN
        return replace(output, logprobs=logprobs)
    scores = list(output.scores)
    top_ids = scores[place].top_ids
    scores[place] = TokenScore(NAN, 1, top_ids, (NAN,) * len(top_ids))
    return replace(output, scores=scores)


class Recording(Passing):
    """Keeps every step and what it gave, in the order of submission."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.steps: list[StepInput] = []
        self.outputs: dict[int, StepOutput] = {}

    def submit(self, step: StepInput, /) -> StepFuture:
        number = len(self.steps)
        self.steps.append(step)

        def keep(output: StepOutput) -> StepOutput:
            self.outputs[number] = output
            return output

        return Then(self.inner.submit(step), keep)


class Logging(Counting):
    """Notes in which order steps are submitted and read."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.log: list[str] = []

    def nth(self, number: int, step: StepInput) -> StepFuture:
        self.log.append(f"submit {number}")
        return _LoggedStep(self.inner.submit(step), lambda: self.log.append(f"read {number}"))


@dataclass
class _LoggedStep:
    future: StepFuture
    note: Callable[[], None]

    def result(self) -> StepOutput:
        self.note()
        return self.future.result()


class Late(Passing):
    """Computes steps as late as it can: when the result of one is asked for, it and those before it.

    Attributes:
        left: steps that are not computed yet.
    """

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.left: list[_LateStep] = []

    def submit(self, step: StepInput, /) -> StepFuture:
        self.left.append(_LateStep(step, self))
        return self.left[-1]


class _LateStep:
    def __init__(self, step: StepInput, executor: Late) -> None:
        self._step, self._executor = step, executor
        self._output: StepOutput | None = None

    def result(self) -> StepOutput:
        while self._output is None:
            first = self._executor.left.pop(0)
            first._output = self._executor.inner.submit(first._step).result()
        return self._output


class Saying(Passing):
    """Draws the tokens of a script, whatever the model would have drawn; for one sequence at a time."""

    def __init__(self, inner: Executor, script: list[int]) -> None:
        super().__init__(inner)
        self._left = list(script)

    def submit(self, step: StepInput, /) -> StepFuture:
        token_ids = [self._left.pop(0) for _ in range(len(step.draws))]
        return Then(self.inner.submit(step), lambda output: replace(output, token_ids=token_ids))
