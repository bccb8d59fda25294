"""Sequences that wait, the most urgent at hand."""

import heapq
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, KeysView
from itertools import count

from mini_infer.scheduler.sequence import Sequence


class WaitingQueue:
    """A heap by ``sequence.order`` for each caller. Whoever leaves from the middle stays there, ignored, until it
    surfaces."""

    def __init__(self) -> None:
        self._heaps: defaultdict[Hashable, list[tuple[tuple[float, ...], int, Sequence]]] = defaultdict(list)
        self._tickets: dict[Sequence, int] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Sequence]:
        """Everyone who waits, in no particular order."""
        return iter(self._tickets)

    @property
    def callers(self) -> KeysView[Hashable]:
        """Whose sequences wait, and perhaps some whose do so no longer."""
        return self._heaps.keys()

    def push(self, sequence: Sequence) -> None:
        ticket = self._tickets[sequence] = next(self._numbers)
        heapq.heappush(self._heaps[sequence.caller], (sequence.order, ticket, sequence))

    def first(self, without: Collection[Hashable] = ()) -> Sequence | None:
        """The most urgent sequence, save those of some callers; None if there is no other."""
        heads = [
            heap[0] for caller, heap in list(self._heaps.items()) if self._surface(caller) and caller not in without
        ]
        return min(heads)[-1] if heads else None

    def _surface(self, caller: Hashable) -> bool:
        """Bring a sequence that waits to the top of a caller's heap; without one the heap goes."""
        heap = self._heaps[caller]
        while heap:
            _, ticket, sequence = heap[0]
            if self._tickets.get(sequence) == ticket:
                return True
            heapq.heappop(heap)
        del self._heaps[caller]
        return False

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        del self._tickets[sequence]
