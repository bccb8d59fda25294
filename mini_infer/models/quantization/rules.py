"""What all readers of a ``quantization_config`` share."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models.checkpoint import Stored
from mini_infer.models.linear import Format

INTEGERS = frozenset({"I32", "U32"})
FLOATS16_32 = frozenset({"F32", "F16", "BF16"})


class Rules(Protocol):
    """Which matrices are quantised, and how."""

    def format(self, matrix: str, stored: Mapping[str, Stored]) -> Format | None:
        """The format of a matrix, by its name; None if it is not quantised."""


def choose(fields: Mapping[str, Any], name: str, supported: Collection[Any], default: Any = None) -> Any:
    """A field that may have only some values.

    Raises:
        UnsupportedModelError: it has another one.
    """
    value = fields.get(name, default)
    if value not in supported:
        shown = ", ".join(str(one) for one in supported)
        raise UnsupportedModelError(f"quantization_config: {name} may be {shown}; got {str(value)[:80]!r}")
    return value


def group_size(value: Any) -> int | None:
    """A group's size, or None for all inputs of an output."""
    if value in (None, -1):
        return None
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise InvalidCheckpointError(f"quantization_config: group_size must be -1 or positive; got {str(value)[:80]!r}")
    return value


def names(value: Any) -> tuple[str, ...]:
    """A list of names or patterns, which may be missing."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise InvalidCheckpointError(f"quantization_config: a list of names is wanted; got {str(value)[:80]!r}")
    return tuple(value)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of compressed-tensors means a module: its name, or ``re:`` and an expression."""
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.match(pattern[3:], name) is not None
    except re.error as error:
        raise InvalidCheckpointError(f"quantization_config: {pattern[:80]!r} is no expression: {error}") from error


def contains(part: str, name: str) -> bool:
    """Whether one of ``modules_to_not_convert`` means a module: by its name, or that of what it is in."""
    return f".{part}." in f".{name}."
