"""Who is being served, so that the server can stop without cutting anybody off."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from mini_infer.serving.errors import ApiError


class Admission:
    """Counts the requests under way, and lets no more in once the server is to stop.

    Attributes:
        draining: whether it is to stop.
    """

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Around everything done for one request.

        Raises:
            ApiError: the server is to stop; 503.
        """
        self.check()
        self._num_active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_active -= 1
            if self._num_active == 0:
                self._idle.set()

    def check(self) -> None:
        """Raise ``ApiError`` if the server is to stop."""
        if self.draining.is_set():
            raise ApiError(
                503, "the server is shutting down; ask another one", code="draining", headers={"retry-after": "5"}
            )

    async def drain(self, timeout: float) -> bool:
        """Let nobody in any more, and wait until all are served; False if that takes more than ``timeout`` seconds."""
        self.draining.set()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True
