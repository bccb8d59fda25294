"""When steps are computed: as they are asked for, on a thread beside the host, or on a GPU's stream."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch

from mini_infer.executor.device import on
from mini_infer.executor.runner import Computed
from mini_infer.step import Executor, StepFuture, StepInput, StepOutput

Run: TypeAlias = Callable[[StepInput], Computed]


class InlineExecutor:
    """Computes a step when its result is asked for, on the thread that asks; for one step at a time."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def submit(self, step: StepInput, /) -> StepFuture:
        return _InlineStep(self._run, step)

    def close(self) -> None:
        pass


class _InlineStep:
    def __init__(self, run: Run, step: StepInput) -> None:
        self._run, self._step = run, step
        self._outcome: Future[StepOutput] = Future()

    def result(self) -> StepOutput:
        if not self._outcome.done():
            try:
                self._outcome.set_result(self._run(self._step).to_output(self._step))
            except BaseException as error:
                self._outcome.set_exception(error)
        return self._outcome.result()


class ThreadExecutor:
    """Computes steps on one thread of its own, so that a CPU's host plans the next one meanwhile."""

    def __init__(self, run: Run) -> None:
        self._run = run
        # PyTorch keeps a thread pool, and its size, for each thread that computes.
        self._worker = ThreadPoolExecutor(1, "mini-infer-model", torch.set_num_threads, (torch.get_num_threads(),))

    def submit(self, step: StepInput, /) -> "Future[StepOutput]":
        return self._worker.submit(lambda: self._run(step).to_output(step))

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)


class StreamExecutor:
    """Launches steps on a GPU, which runs them in that order; the host only waits for what it reads."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run, self._device = run, device

    def submit(self, step: StepInput, /) -> StepFuture:
        try:
            with on(self._device):
                in_memory = self._run(step).in_memory()
                done = torch.cuda.Event()
                done.record()
        except Exception as error:
            failed: Future[StepOutput] = Future()
            failed.set_exception(error)
            return failed
        return _StreamStep(step, in_memory, done)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)


class _StreamStep:
    def __init__(self, step: StepInput, in_memory: Computed, done: torch.cuda.Event) -> None:
        self._step, self._in_memory, self._done = step, in_memory, done

    def result(self) -> StepOutput:
        self._done.synchronize()
        return self._in_memory.to_output(self._step)


def make_executor(run: Run, device: torch.device, depth: int) -> Executor:
    """What computes steps on a device, so that ``depth`` of them can be under way."""
    if device.type != "cpu":
        return StreamExecutor(run, device)
    return InlineExecutor(run) if depth == 1 else ThreadExecutor(run)
