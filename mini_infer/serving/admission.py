"""Who is being served, so that the server can stop without cutting anybody off; and how much all of them hold."""

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


class Budget:
    """How much of something all requests together may hold.

    Args:
        name: what the limit is called.
        total: how much there is.
    """

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = total
        self._held = 0

    def take(self, amount: int) -> None:
        """Raise ``ApiError``, status 503, if there is not so much left."""
        if self._held + amount > self._total:
            raise ApiError(
                503,
                f"requests under way hold {self._held} of {self._name}={self._total}, so {amount} more do not fit; "
                "try again in a moment, or ask for less",
                code="busy",
                headers={"retry-after": "1"},
            )
        self._held += amount

    def give_back(self, amount: int) -> None:
        self._held -= amount
