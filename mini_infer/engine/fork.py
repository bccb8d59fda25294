"""A fork takes none of an engine's threads along, and perhaps a lock that nobody will ever open."""

import os
import threading
from types import TracebackType

from mini_infer.exceptions import EngineError


class OwnLock:
    """A reentrant lock that refuses, in a forked child, what would wait for ever."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()

    def check(self) -> None:
        """Raise ``EngineError`` in any process but the one that made the lock."""
        if os.getpid() != self._process:
            raise EngineError(
                f"this engine belongs to process {self._process} and this is {os.getpid()}, a fork of it, which has "
                "none of the engine's threads; make an engine of its own here, or start processes with 'spawn'"
            )

    def __enter__(self) -> "OwnLock":
        self.check()
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
