"""How many cores other programs leave us.

All threads of a kernel wait for the last one. If that one shares its core with a busy program, it does not run for
milliseconds at a time, and so nobody does: two threads beside one such program are slower than one thread. So kernels
start no more threads than there are cores that others do not use, as the system's counters told over the last while.

Linux counts (``/proc/stat``); elsewhere all cores are taken to be free.
"""

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.25
"""Seconds between two looks at the counters."""

LATEST = 1.0
"""Seconds after which a look says nothing: while we rested, others may have worked, and have ended."""

SPARE = 0.4
"""How much of a core others may use while a thread of ours still takes it. Less than half: that is what a busy program
gets of a core that it shares with such a thread."""

_COUNTERS = Path("/proc/stat")


@dataclass(frozen=True)
class Reading:
    """Counters at a moment, in seconds.

    Attributes:
        wall: the time.
        used: processor time of everybody, on those cores that this process may use.
        own: this process's.
    """

    wall: float
    used: float
    own: float


def read(cores: set[int]) -> Reading | None:
    """The counters as they are; None where there are none."""
    try:
        lines = _COUNTERS.read_text().splitlines()
        ticks_per_second = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for name, *counts in map(str.split, filter(None, lines)):
        if name in names:
            user, nice, system, _idle, _waiting, interrupts, deferred = map(int, counts[:7])
            ticks += user + nice + system + interrupts + deferred
    return Reading(time.monotonic(), ticks / ticks_per_second, time.process_time())


def left(before: Reading, after: Reading, num_cores: int) -> int:
    """Cores that others left between two readings; one at least."""
    others = max(0.0, (after.used - before.used) - (after.own - before.own)) / (after.wall - before.wall)
    return max(1, int(num_cores - others + SPARE))


class Cores:
    """Those of this process: the last reading, and what followed from it."""

    def __init__(self) -> None:
        self._mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self._left = len(self._mine)
        self._last = read(self._mine)

    def threads(self, wanted: int) -> int:
        """How many of the threads that a kernel wants it should have; all, if it wants more than there are cores."""
        if self._last is None or not 1 < wanted <= len(self._mine):
            return wanted
        since = time.monotonic() - self._last.wall
        if since >= INTERVAL:
            now = read(self._mine)
            if now is not None:
                self._left = left(self._last, now, len(self._mine)) if since < LATEST else len(self._mine)
                self._last = now
        return min(wanted, self._left)


@functools.cache
def here() -> Cores:
    """The cores of this process."""
    return Cores()
