"""Sequences that wait, the most urgent at hand."""

import heapq
from collections.abc import Iterator
from itertools import count

from mini_infer.scheduler.sequence import Sequence


class WaitingQueue:
    """A heap by ``sequence.order``. Whoever leaves from the middle stays in the heap, ignored, until it surfaces."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], int, Sequence]] = []
        self._tickets: dict[Sequence, int] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Sequence]:
        """Everyone who waits, in no particular order."""
        return iter(self._tickets)

    def push(self, sequence: Sequence) -> None:
        ticket = self._tickets[sequence] = next(self._numbers)
        heapq.heappush(self._heap, (sequence.order, ticket, sequence))

    def first(self) -> Sequence:
        """The most urgent sequence; the queue must not be empty."""
        while True:
            _, ticket, sequence = self._heap[0]
            if self._tickets.get(sequence) == ticket:
                return sequence
            heapq.heappop(self._heap)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        del self._tickets[sequence]
