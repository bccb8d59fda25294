"""Several replicas of a model behind the face of one loop.

Each is a loop of its own, with its own scheduler, blocks and prefix cache, around an executor in other processes. They
say nothing to each other. Whoever drives them has all of them compute, and reads whichever answers first.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from operator import attrgetter
from typing import Any

from mini_infer.engine.loop import EngineLoop, Flight, LoopCounts, StepObserver, StepResult
from mini_infer.engine.request import Request
from mini_infer.engine.router import Router
from mini_infer.scheduler import SchedulerOutputs

_PATIENCE = 1.0
"""Seconds without any answer, after which the oldest step is waited for, which finds out what is wrong."""


class Replicas:
    """Moves the requests of all replicas along; used as an `EngineLoop` is.

    Args:
        loops: one for each; the futures of their executors have a ``fileno`` that can be waited for.
        router: says where a request goes.
    """

    def __init__(self, loops: Sequence[EngineLoop], router: Router) -> None:
        self.loops = list(loops)
        self.finished: dict[str, Request] = {}
        for loop in loops:
            loop.finished = self.finished
            loop.watch(_Accounts(router))
        self.requests: Mapping[str, Request] = ChainMap(*(loop.requests for loop in loops))
        self._router = router
        self._served: list[EngineLoop] = list(loops)  # the one whose step was read last is last

    @property
    def num_waiting_requests(self) -> int:
        return sum(loop.num_waiting_requests for loop in self.loops)

    @property
    def counts(self) -> LoopCounts:
        return LoopCounts.total([loop.counts for loop in self.loops])

    def is_finished(self) -> bool:
        return all(loop.is_finished() for loop in self.loops)

    def enqueue(self, request: Request) -> None:
        """Queue a request where it costs least; raises as ``EngineLoop.enqueue``."""
        chosen = self._router.choose(request, request.prompt_token_ids, request.params.cache_salt)
        try:
            self.loops[chosen].enqueue(request)
        except BaseException:
            self._router.ended(request)
            raise

    def abort(self, request: Request) -> None:
        for loop in self.loops:
            if loop.requests.get(request.request_id) is request:
                loop.abort(request)

    def advance(self) -> StepResult:
        """Read one step of any replica, while all others compute; raises as ``EngineLoop.advance``."""
        failed = [request for loop in self.loops for request in loop.launch()]
        flying = [loop for loop in self._served if loop.flights]
        if not flying:
            return StepResult(SchedulerOutputs(), failed)
        futures: list[Any] = [loop.flights[0].future for loop in flying]
        answered: list[Any] = wait(futures, _PATIENCE)
        first = next((loop for loop, future in zip(flying, futures, strict=True) if future in answered), flying[0])
        self._served.remove(first)
        self._served.append(first)
        result = first.advance()
        return replace(result, finished=[*failed, *result.finished])

    def close(self) -> None:
        """Close all of them, even if one fails to."""
        errors = []
        for loop in self.loops:
            try:
                loop.close()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]


class _Accounts(StepObserver):
    """Tells the router what has become of requests."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def committed(self, flight: Flight, result: StepResult) -> None:
        for request in filter(attrgetter("first_token_time"), flight.requests):
            self._router.computed(request)

    def ended(self, request: Request) -> None:
        self._router.ended(request)
