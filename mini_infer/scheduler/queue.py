"""Sequences that wait, the most urgent at hand."""

import heapq
from collections.abc import Iterator

from mini_infer.scheduler.sequence import Sequence, SequenceStatus


class WaitingQueue:
    """A heap by ``sequence.order``. A sequence that leaves from the middle stays in it, ignored, until it surfaces."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """Everyone who waits, in no particular order."""
        return (sequence for _, sequence in self._heap if sequence.status is SequenceStatus.WAITING)

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.order, sequence))
        self._length += 1

    def first(self) -> Sequence:
        """The most urgent sequence; the queue must not be empty."""
        while self._heap[0][1].status is not SequenceStatus.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def pop(self) -> Sequence:
        """Take the most urgent sequence out."""
        sequence = self.first()
        heapq.heappop(self._heap)
        self._length -= 1
        return sequence

    def note_departure(self) -> None:
        """A waiting sequence has ended: its status says so already."""
        self._length -= 1
