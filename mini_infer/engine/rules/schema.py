"""JSON schemas before they are compiled: what would take too long is refused, and objects are closed."""

import json
import re
from decimal import Decimal
from math import lcm
from typing import Any

from mini_infer.exceptions import InvalidRequestError

MAX_DEPTH = 100
"""Deepest nesting of a schema."""

MAX_OPTIONAL = 1_000_000
"""Most that the squares of all objects' numbers of properties may sum up to: compiling takes so long."""

MAX_MULTIPLE = 2_000
"""Largest common multiple of a schema's ``multipleOf``, counted in units of their last decimal: an automaton has that
many states."""

MAX_DECIMALS = 20

MAX_COUNTED = 50_000
"""Most characters that the counts of an expression add, of which ``(ab){3}`` has four: all of them may be forced at
once, and be found in one step."""

_PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)
"""An escape, a class, a count, or one character."""

_COMBINED = frozenset({"allOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"})
"""Where one of these is, what an object may hold is said in several places."""

_MAPS, _LISTS = ("properties", "patternProperties", "$defs", "definitions"), ("anyOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "contains", "propertyNames", "additionalItems")


def checked_schema(text: str) -> Any:
    """A schema from its text.

    An object that says which properties it has, and not that it may have others, gets no others: a model that loses
    its way would make up one after the other. What it then writes is valid for the schema as it was, too.

    Raises:
        InvalidRequestError: it is no JSON, too deep, or would take too long.
    """
    try:
        schema = json.loads(text)
    except RecursionError:
        raise InvalidRequestError(f"a JSON schema may be {MAX_DEPTH} levels deep, and this one is deeper") from None
    except ValueError as error:
        raise InvalidRequestError(f"the JSON schema is not valid JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(f"a JSON schema must be an object, got {repr(schema)[:80]}")
    _check_costs(schema)
    keys = _keywords(schema)
    return schema if keys is None or keys & _COMBINED else _closed(schema)


def check_counts(pattern: str) -> int:
    """How many characters longer a regular expression gets when its counts are written out.

    Raises:
        InvalidRequestError: too many.
    """
    lengths, last = [0], 0  # of the groups that are open; of the piece that a count would repeat
    for piece in _PIECES.finditer(pattern):
        if piece[1]:
            digits = max(piece[1].lstrip("0"), (piece[2] or "").lstrip("0"), key=lambda d: (len(d), d))
            repeated = last * int(digits[:9] or 0)
            lengths[-1], last = lengths[-1] - last + repeated, repeated
        elif piece[0] == "(":
            lengths.append(0)
        elif piece[0] == ")" and len(lengths) > 1:
            last = lengths.pop()
            lengths[-1] += last
        else:
            lengths[-1], last = lengths[-1] + 1, 1
        if lengths[-1] > MAX_COUNTED + piece.end():
            raise InvalidRequestError(
                f"the expression {pattern[:40]!r} gets more than {MAX_COUNTED} characters longer when its counts are "
                "written out; lower them, or say * or +"
            )
    return max(0, lengths[0] - len(pattern))


def _check_costs(schema: Any) -> None:
    num_optional, multiples = 0, {Decimal(1)}
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"a JSON schema may be {MAX_DEPTH} levels deep, and this one is deeper")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node.values()
                named = node.get("patternProperties")
                for pattern in (node.get("pattern"), *(named if isinstance(named, dict) else ())):
                    if isinstance(pattern, str):
                        check_counts(pattern)
                if isinstance(node.get("properties"), dict):
                    num_optional += len(node["properties"]) ** 2
                multiple = node.get("multipleOf")
                if isinstance(multiple, int | float) and not isinstance(multiple, bool) and multiple > 0:
                    multiples.add(Decimal(repr(multiple)))
            elif isinstance(node, list):
                below += node
        level = below
    if num_optional > MAX_OPTIONAL:
        raise InvalidRequestError(
            "the JSON schema has too many properties: their squares, summed over all objects, are "
            f"{num_optional}, but at most {MAX_OPTIONAL} are taken"
        )
    decimals = max(-int(number.as_tuple().exponent) for number in multiples if number.is_finite())
    if decimals > MAX_DECIMALS or any(not number.is_finite() or number > MAX_MULTIPLE for number in multiples):
        common = MAX_MULTIPLE + 1
    else:
        common = lcm(*(int(number.scaleb(max(decimals, 0))) for number in multiples - {Decimal(1)}))
    if common > MAX_MULTIPLE:
        shown = ", ".join(map(str, sorted(multiples - {Decimal(1)})[:5]))
        raise InvalidRequestError(
            f"multipleOf ({shown}): counted in the last decimal, the common multiple may be at most {MAX_MULTIPLE}"
        )


def _keywords(schema: Any) -> set[str] | None:
    """The keywords that are used anywhere; None where an object's properties are said beside ``anyOf`` or ``$ref``."""
    found: set[str] = set()
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            if "properties" in node and {"anyOf", "$ref"} & node.keys():
                return None
            found |= node.keys()
            rest += _children(node)
    return found


def _children(node: dict[str, Any]) -> list[Any]:
    children: list[Any] = [node[name] for name in _SINGLE if name in node]
    for name in _LISTS:
        children += node[name] if isinstance(node.get(name), list) else []
    for name in _MAPS:
        children += node[name].values() if isinstance(node.get(name), dict) else []
    return children


def _closed(schema: Any) -> Any:
    for node in _children(schema) if isinstance(schema, dict) else []:
        _closed(node)
    if isinstance(schema, dict) and isinstance(properties := schema.get("properties"), dict):
        required, least = schema.get("required", ()), schema.get("minProperties", 0)
        says_more = {"additionalProperties", "patternProperties", "propertyNames"} & schema.keys()
        names = isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required)
        if not says_more and (names or not required) and isinstance(least, int | float) and least <= len(properties):
            schema["additionalProperties"] = False
    return schema
