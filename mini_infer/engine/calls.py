"""Reads the calls of tools out of a text while it is written.

Arguments are handed on as they stand in the text, piece by piece, and never read and written again: a caller who joins
the pieces has the very JSON that the model wrote.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import regex

from mini_infer.engine.tools import ToolFormat

PYTHON_TAG = "<|python_tag|>"

_ENDS = ("</tool_call>", PYTHON_TAG)
"""What may stand behind a call."""

_JSON_HEAD = regex.compile(
    r"(<tool_call>|\[TOOL_CALLS\])?\s*\[?\s*\{\s*(\"type\"\s*:\s*\"function\"\s*,\s*)?"
    r'"name"\s*:\s*"(?P<name>[A-Za-z0-9_.-]+)"\s*,\s*"(arguments|parameters)"\s*:\s*(?=\S)'
)
_ARGS_HEAD = regex.compile(r"\[TOOL_CALLS\]\s*(?P<name>[A-Za-z0-9_.-]+)\s*(\[ARGS\]\s*)?(?=\{)")


@dataclass(frozen=True, slots=True)
class Text:
    """Something that is not part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a tool; ``index`` is which of the answer's calls."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of a call's arguments."""

    index: int
    text: str


Piece: TypeAlias = Text | CallBegins | Arguments


class CallScanner:
    """Splits an answer into text and calls.

    What begins like a call and is none stays text. Once a call's name is known it is a call, whatever follows.

    Args:
        format: how calls are written.
    """

    def __init__(self, format: ToolFormat) -> None:
        self._mark = format.mark
        self._pattern = _JSON_HEAD if format.keys else _ARGS_HEAD
        self._rest = ""  # what nothing was said of yet
        self._space = ""  # what stood before a mark
        self._state: Callable[[bool], Iterator[Piece]] = self._text if format.mark else self._beginning
        self._value = _Value()
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """What became certain with these further characters."""
        self._rest += text
        return self._run(is_last=False)

    def end(self) -> list[Piece]:
        """What is left when no more characters come."""
        return self._run(is_last=True)

    def _run(self, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        before = None
        while (self._state, self._rest) != before:
            before = self._state, self._rest
            pieces += self._state(is_last)
        return pieces

    # ---- states: each takes what it can off the front of the rest --------------------------------------------------

    def _text(self, is_last: bool) -> Iterator[Piece]:
        """Up to the mark of a call; whitespace before it is nobody's."""
        place = self._rest.find(self._mark)
        until = place if place >= 0 else len(self._rest) if is_last else len(self._rest) - self._num_of_mark()
        told = self._rest[:until] if is_last and place < 0 else self._rest[:until].rstrip()
        if place >= 0:
            self._space = self._rest[len(told) : place]
            self._rest, self._state = self._rest[place:], self._head
        else:
            self._rest = self._rest[len(told) :]
        if told:
            yield Text(told)

    def _num_of_mark(self) -> int:
        """How many of the last characters may be the beginning of a mark."""
        lengths = range(len(self._mark) - 1, 0, -1)
        return next((length for length in lengths if self._rest.endswith(self._mark[:length])), 0)

    def _beginning(self, is_last: bool) -> Iterator[Piece]:
        """Without marks an answer is a call from its first brace on, or no call at all."""
        start = self._rest.lstrip()
        if start.startswith(PYTHON_TAG):
            self._rest = start[len(PYTHON_TAG) :]
        elif start.startswith("{"):
            self._rest, self._state = start, self._head
        elif is_last or (start and not PYTHON_TAG.startswith(start)):
            self._state = self._plain
        yield from ()

    def _plain(self, is_last: bool) -> Iterator[Piece]:
        text, self._rest = self._rest, ""
        if text:
            yield Text(text)

    def _head(self, is_last: bool) -> Iterator[Piece]:
        """A call, up to its arguments."""
        found = self._pattern.match(self._rest, partial=not is_last)
        if found is None and self._mark and self._rest.startswith(self._mark):  # no call; perhaps the next mark is one
            self._rest, self._state = self._rest[len(self._mark) :], self._text
            yield Text(self._space + self._mark)
        elif found is None:
            self._state = self._plain
        elif not found.partial:
            self._rest, self._state, self._value = self._rest[found.end() :], self._arguments, _Value()
            self.num_calls += 1
            yield CallBegins(self.num_calls - 1, found["name"])

    def _arguments(self, is_last: bool) -> Iterator[Piece]:
        length = self._value.take(self._rest)
        text, self._rest = self._rest[:length], self._rest[length:]
        if self._value.has_ended:
            self._state = self._behind
        if text:
            yield Arguments(self.num_calls - 1, text)

    def _behind(self, is_last: bool) -> Iterator[Piece]:
        """Between two calls or behind the last one: brackets, marks, separators."""
        self._rest = rest = self._rest.lstrip(" \n\r\t,;}]")
        for end in _ENDS:
            if rest.startswith(end):
                self._rest = rest[len(end) :]
                return
        if rest.startswith("{") or (self._mark and rest.startswith(self._mark)):
            self._state = self._head
        elif is_last or not any(mark.startswith(rest) for mark in (*_ENDS, self._mark)):
            self._state = self._text if self._mark else self._plain
        yield from ()


@dataclass(slots=True)
class _Value:
    """Finds the end of a JSON value that comes in pieces."""

    depth: int = 0
    in_string: bool = False
    is_escaped: bool = False
    has_ended: bool = False

    def take(self, text: str) -> int:
        """How many of these characters are the value's."""
        for place, character in enumerate(text):
            if self.has_ended:
                return place
            if self.is_escaped:
                self.is_escaped = False
            elif self.in_string:
                self.is_escaped = character == "\\"
                self.in_string = character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth < 0:  # of what it stands in: the value was a bare word
                    self.has_ended = True
                    return place
                self.has_ended = self.depth == 0
        return len(text)
