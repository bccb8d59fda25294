"""What a request's text must look like: a JSON schema, a regular expression, some choices, or a grammar."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mini_infer.exceptions import InvalidRequestError
from mini_infer.fields import named_options

MAX_GRAMMAR_CHARACTERS = 128 * 1024
"""Longest schema, expression or grammar."""

_REFUSED = {
    "structural_tag": "grammars that begin in the middle of a text are not supported; give a grammar for all of it",
    "whitespace_pattern": "JSON is written on one line; a grammar can say it otherwise",
    "disable_fallback": "there is one way of following grammars",
}


@named_options(InvalidRequestError, {}, _REFUSED)
@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a completion's text must match as a whole; exactly one is given (the names are vLLM's).

    Every token is drawn from those that the text can go on with, and it ends only where it is complete. A completion
    that ``max_tokens`` cuts off is a beginning of such a text.

    Attributes:
        json: a JSON schema, as a dictionary or as JSON text. Answers are written on one line, ``{"a": 1, "b": [2]}``,
            with properties in the schema's order.
        regex: a regular expression for the whole text, in Rust's syntax: without look-around or back-references.
        choice: the texts of which it is one.
        grammar: a context-free grammar in llguidance's form of Lark, whose first rule is ``start``.
        json_object: any JSON object.

    Raises:
        InvalidRequestError: none or several are given, or one is malformed or too long.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise InvalidRequestError(
                f"structured outputs need one of {names}, got {' and '.join(given) if given else 'none of them'}"
            )
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choice(self.choice))
        elif self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        elif self.json_object is not None and self.json_object is not True:
            raise InvalidRequestError(f"json_object must be True or False, got {self.json_object!r}")
        (name,) = given
        value = getattr(self, name)
        if name in ("regex", "grammar") and (not isinstance(value, str) or not value):
            raise InvalidRequestError(f"{name} must be a non-empty string, got {repr(value)[:80]}")
        length = sum(map(len, value)) if name == "choice" else len(value) if isinstance(value, str) else 0
        if length > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequestError(
                f"{name} has {length} characters, but at most {MAX_GRAMMAR_CHARACTERS} are taken; shorten it"
            )

    def as_rule(self) -> str:
        """The same as the body of a rule of ``grammar``.

        Raises:
            InvalidRequestError: it is a grammar itself, which has rules of its own.
        """
        if self.grammar is not None:
            raise InvalidRequestError("a grammar of one's own cannot stand beside tools; give regex, json or choice")
        if self.regex is not None:
            return "/" + self.regex.replace("/", "\\/") + "/"
        if self.choice is not None:
            return " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice)
        schema = '{"type": "object"}' if self.json is None else self.json
        return f"%json {schema}"


def _checked_choice(choice: Any) -> tuple[str, ...]:
    if not isinstance(choice, list | tuple) or not choice or not all(isinstance(s, str) and s for s in choice):
        raise InvalidRequestError(f"choice must be a list of non-empty strings, got {repr(choice)[:80]}")
    return tuple(choice)


def _schema_text(schema: Any) -> str:
    """A schema as JSON text, so that equal ones can be found again."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, Mapping | bool):
        raise InvalidRequestError(f"json must be a JSON schema, an object or its text, got {repr(schema)[:80]}")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, default=dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"json is no JSON schema: {error}") from error
