"""Work that takes a while, on a few threads of its own: what waits is bounded, and so is how long anybody waits."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mini_infer.serving.errors import ApiError

T = TypeVar("T")

SMALL = 1 << 16
"""Bytes, characters or ids that are looked through in a few milliseconds, where a pool of its own would be too much."""


class Pool:
    """A few threads for one kind of work.

    Args:
        name: what is done.
        num_threads: how many do it.
        max_waiting: jobs that may wait for a thread.
        timeout: seconds that a caller waits, at most; None for as long as it takes.
    """

    def __init__(self, name: str, num_threads: int, max_waiting: int = 32, timeout: float | None = 30.0) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(num_threads, f"mini-infer-{name}")
        self._room = num_threads + max_waiting
        self._timeout = timeout
        self._num_jobs = 0

    async def run(self, function: Callable[[], T]) -> T:
        """What a function returns or raises, run on one of the threads.

        Raises:
            ApiError: too much waits already, or the work takes too long; 503.
        """
        if self._num_jobs >= self._room:
            raise _busy(f"{self._num_jobs} jobs wait to be done ({self._name}); try again in a moment")
        self._num_jobs += 1
        job = asyncio.wrap_future(self._executor.submit(function))
        job.add_done_callback(self._done)  # a caller who has left does not end the work
        try:
            await asyncio.wait({job}, timeout=self._timeout)
            if not job.done():
                raise _busy(f"not done within {self._timeout:g} seconds ({self._name}); send less at once")
            return job.result()
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:  # a panic in a tokenizer is none of Python's ordinary exceptions
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            del job  # whose error refers to this frame: all that the work read would wait for the collector

    def _done(self, job: "asyncio.Future[T]") -> None:
        self._num_jobs -= 1
        if not job.cancelled():
            job.exception()  # which its caller has seen, or has left

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def _busy(message: str) -> ApiError:
    return ApiError(503, message, code="busy", headers={"retry-after": "1"})
