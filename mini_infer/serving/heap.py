"""What large bodies and answers leave behind goes back to the system, where the C library (glibc's) would keep it."""

import ctypes
from typing import Any

_M_ARENA_MAX = -8

_ARENAS = 2
"""Heaps of the process. By default many threads have one each, and each keeps as much as its thread ever needed."""


def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # as on Windows
        return None


def have_few_heaps() -> None:
    """To be called before there are many threads."""
    if (set_option := _function("mallopt")) is not None:
        set_option(_M_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """Return what is free to the system; some milliseconds, on a thread that nobody waits for."""
    if (trim := _function("malloc_trim")) is not None:
        trim(0)
