"""A clock that is right on a GPU, and what this machine can do at best: copying and multiplying."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import roofline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLUSH_BYTES = 1 << 30
"""More than any GPU's L2 cache, and so much that writing it takes the GPU longer than launching takes the host."""


class DeviceInstant:
    """A point on the GPU's own time line. The difference of two is in seconds, and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "DeviceInstant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


now: Callable[[], object] = DeviceInstant if DEVICE == "cuda" else time.perf_counter
"""For pytest-benchmark, which subtracts what it returns."""


class Flush:
    """Empties the L2 cache. The GPU is still at it when the host launches what comes next: launching is not timed."""

    def __init__(self) -> None:
        self.buffer = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=DEVICE) if DEVICE == "cuda" else None

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def median_seconds(function: Callable[[], object], rounds: int = 15) -> float:
    flush, times = Flush(), []
    for _ in range(rounds):
        flush()
        start = now()
        function()
        times.append(now() - start)  # type: ignore[operator]
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written bytes together."""
    source = torch.zeros((1 << 30 if DEVICE == "cuda" else 1 << 27) // 4, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def matrix_peak(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    return roofline.matrix_peak(torch.device(DEVICE), dtype)
