"""Dataclasses that people fill in by hand: other spellings, clear refusals, and checks that name the field."""

import difflib
import functools
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, *, hash: bool = True) -> Any:
    """A dataclass field with its one-line description.

    ``hash`` is whether the field counts when the whole is hashed; one that holds a dictionary cannot.
    """
    return field(default=default, hash=hash, metadata={"help": help})


def named_options(
    error: type[Exception], aliases: Mapping[str, str], unsupported: Mapping[str, str]
) -> Callable[[type[T]], type[T]]:
    """Make a dataclass accept other names for its fields and refuse every further one with ``error``.

    Scalars of NumPy and the like become Python's own (see ``plain``).

    Args:
        error: raised for a name that is unknown, unsupported, or given twice under two spellings.
        aliases: other names, each with the field's own.
        unsupported: names that other engines have and this one does not, each with the reason.
    """

    def decorate(cls: type[T]) -> type[T]:
        plain_init = cls.__init__
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]

        @functools.wraps(plain_init)
        def init(self: T, *args: Any, **options: Any) -> None:
            given = dict(zip(names, map(plain, args), strict=False))
            for name, value in options.items():
                known = aliases.get(name, name)
                if name in unsupported:
                    raise error(f"{name}={value!r}: {unsupported[name]}")
                if known not in names:
                    close = difflib.get_close_matches(name, [*names, *aliases], n=1)
                    hint = f"did you mean {close[0]!r}?" if close else f"{cls.__name__} has: {', '.join(names)}"
                    raise error(f"{cls.__name__} has no option {name!r} (given: {value!r}); {hint}")
                if known in given:
                    raise error(f"{known!r} is given twice: {given[known]!r} and {value!r} (as {name!r}); give it once")
                given[known] = plain(value)
            try:
                plain_init(self, *args[len(names) :], **given)
            except error as problem:
                spelled = {aliases[name]: name for name in options if name in aliases}
                if not spelled:
                    raise
                raise error(respelled(str(problem), spelled)) from problem

        setattr(cls, "__init__", init)  # noqa: B010  (mypy refuses the plain assignment)
        return cls

    return decorate


def respelled(message: str, spelled: Mapping[str, str]) -> str:
    """A message about an option that begins with its name, for somebody who wrote another name.

    Args:
        spelled: what was written, for each option that was given under another name.
    """
    name = re.match(r"\w*", message)
    return f"{spelled[name[0]]}: {message}" if name and name[0] in spelled else message


def plain(value: Any) -> Any:
    """Another library's scalar as Python's own: whatever has ``__index__`` or ``__float__`` becomes an int or a float,
    NumPy's booleans become bool, and all else stays as it is."""
    if isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if hasattr(value, "shape"):  # of NumPy, torch, JAX; an array with a dimension is no scalar
        return value.item() if value.shape == () else value
    if hasattr(type(value), "__index__"):
        return operator.index(value)
    return float(value) if hasattr(type(value), "__float__") else value


def plain_ids(values: Any) -> Any:
    """A list of ids, a tuple or an array of them as a list of Python's own integers; anything else as it is."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if not isinstance(values, list | tuple):
        return values
    return [value if type(value) is int else plain(value) for value in values]  # which most are


def check_int(error: type[Exception], name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """The value as an int; raise ``error`` unless it is an integer (and no bool) within the bounds, both inclusive."""
    number = plain(value)
    within = isinstance(number, int) and number >= minimum and (maximum is None or number <= maximum)
    if isinstance(number, bool) or not within:
        bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise error(f"{name} must be an integer {bounds}, got {value!r}")
    return int(number)


def check_number(
    error: type[Exception], name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """The value as Python's own number; raise ``error`` unless it is finite and in ``[low, high]``, or ``(low, high]``
    with ``open_low``."""
    number = plain(value)
    is_finite = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= sys.float_info.max
    if not is_finite or not low <= number <= high or (open_low and number == low):
        below = f"more than {low:g}" if open_low else f"at least {low:g}"
        above = "" if high == math.inf else f" and at most {high:g}"
        raise error(f"{name} must be a finite number of {below}{above}, got {value!r}")
    return number  # type: ignore[no-any-return]


def check_bool(error: type[Exception], name: str, value: Any) -> bool:
    """The value as a bool; raise ``error`` unless it is True or False."""
    if not isinstance(plain(value), bool):
        raise error(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(error: type[Exception], name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``error`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise error(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
