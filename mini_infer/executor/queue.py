"""What the device is to do, in order, while the host goes on: a CUDA stream, or on a CPU a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Sampled(NamedTuple):
    """What a step gives.

    Attributes:
        token_ids: int64 ``[S]``, one for each completion that samples.
        logprobs: floats ``[S]``, under the model itself.
    """

    token_ids: Tensor
    logprobs: Tensor


class QueuedStep(Protocol):
    """A step that is computed now, or will be."""

    def sampled(self) -> Sampled:
        """Its result on the device, for steps that are queued behind it; they may call this, the host may not."""

    def wait(self) -> Sampled:
        """Its result in CPU memory, once it is there; raises what the step raised."""


class StepQueue(Protocol):
    def submit(self, step: Callable[[], Sampled]) -> QueuedStep:
        """Have a step computed after those that were submitted before."""

    def drain(self) -> None:
        """Return when nothing that was submitted still runs beside the caller's own use of the device."""


class ThreadQueue:
    """On a CPU the model computes on one thread, with the thread pool that PyTorch keeps for that thread."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "mini-infer-model", torch.set_num_threads, (torch.get_num_threads(),))

    def submit(self, step: Callable[[], Sampled]) -> QueuedStep:
        return _ThreadStep(self._worker.submit(step))

    def drain(self) -> None:
        self._worker.submit(lambda: None).result()


class _ThreadStep(NamedTuple):
    future: "Future[Sampled]"

    def sampled(self) -> Sampled:
        return self.future.result()

    def wait(self) -> Sampled:
        return self.future.result()


class StreamQueue:
    """On a GPU the host only launches; the device runs what was launched in that order."""

    def submit(self, step: Callable[[], Sampled]) -> QueuedStep:
        on_device = step()
        in_memory = Sampled(*(tensor.to("cpu", non_blocking=True) for tensor in on_device))
        done = torch.cuda.Event()
        done.record()
        return _StreamStep(on_device, in_memory, done)

    def drain(self) -> None:
        """What the caller launches comes after it, too."""


class _StreamStep(NamedTuple):
    on_device: Sampled
    in_memory: Sampled
    done: torch.cuda.Event

    def sampled(self) -> Sampled:
        return self.on_device

    def wait(self) -> Sampled:
        self.done.synchronize()
        return self.in_memory


def step_queue(device: torch.device) -> StepQueue:
    """The queue for steps on a device."""
    return ThreadQueue() if device.type == "cpu" else StreamQueue()
