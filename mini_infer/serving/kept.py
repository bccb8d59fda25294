"""What is kept for a while, so that somebody can come back for it."""

import time
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class _Entry(NamedTuple, Generic[V]):
    value: V
    size: int
    since: float


class Kept(Generic[K, V]):
    """Values by their keys: at most so many, together of at most so much, and each for so long. The oldest go first.

    Args:
        most: values.
        seconds: how long each is kept.
        most_size: what their sizes may come to; one that is larger by itself is not kept.
    """

    def __init__(self, most: int, seconds: float, most_size: int) -> None:
        self._most, self._seconds, self._most_size = most, seconds, most_size
        self._entries: dict[K, _Entry[V]] = {}  # in the order in which they came
        self._size = 0

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value, under a key that is new."""
        self._entries[key] = _Entry(value, size, time.monotonic())
        self._size += size
        self._drop_old()

    def get(self, key: K) -> V | None:
        """The value, if it is still there."""
        self._drop_old()
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def pop(self, key: K) -> V | None:
        """The value, which is kept no longer."""
        self._drop_old()
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._size -= entry.size
        return entry.value

    def _drop_old(self) -> None:
        while self._entries:
            oldest, entry = next(iter(self._entries.items()))
            is_young = time.monotonic() - entry.since <= self._seconds
            if is_young and len(self._entries) <= self._most and self._size <= self._most_size:
                return
            del self._entries[oldest]
            self._size -= entry.size
