"""A step and its result as bytes, for ranks in other processes: nothing in them can run as code.

A step is one header of integers, with the dtype and shape of each array, and the arrays behind it; both sides know its
type. A result is JSON, in which floats come back as the same bits.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from mini_infer.step import StepInput, StepOutput, TokenScore

_DTYPES = ("<i8", "<i4", "<u8", "<f8", "<f4", "|b1", "|u1")

_ALIGNMENT = 8
"""Bytes; every array begins at a multiple."""

_MISSING = -1
"""In place of a dtype: None."""


def pack_step(step: StepInput) -> bytes:
    """A step as bytes."""
    header: list[int] = []
    body: list[bytes] = []
    for leaf in _leaves(step):
        if leaf is None:
            header.append(_MISSING)
            continue
        array = np.ascontiguousarray(leaf)
        header += [_DTYPES.index(array.dtype.str), np.ndim(leaf), *np.shape(leaf)]
        body += [array.tobytes(), bytes(-array.nbytes % _ALIGNMENT)]
    return b"".join([np.array([len(header), *header], dtype="<i8").tobytes(), *body])


def unpack_step(data: bytes) -> StepInput:
    """The step that ``pack_step`` made into these bytes."""
    memory = bytearray(data)  # tensors that share an array's memory want to be able to write there
    length = int(np.frombuffer(memory, "<i8", count=1)[0])
    header = iter(np.frombuffer(memory, "<i8", count=length, offset=_ALIGNMENT).tolist())
    offset = _ALIGNMENT * (1 + length)

    def arrays() -> Iterator[npt.NDArray[Any] | None]:
        nonlocal offset
        for code in header:
            if code == _MISSING:
                yield None
                continue
            shape = [next(header) for _ in range(next(header))]
            array = np.frombuffer(memory, _DTYPES[code], count=int(np.prod(shape)), offset=offset).reshape(shape)
            offset += array.nbytes + -array.nbytes % _ALIGNMENT
            yield array

    step: StepInput = _build(StepInput, arrays())
    return step


def _leaves(value: Any) -> Iterator[Any]:
    cls: Any = type(value)
    for name, kind in _kinds(cls):
        part = getattr(value, name)
        if is_dataclass(kind) and part is not None:
            yield from _leaves(part)
        else:
            yield part


def _build(cls: Any, leaves: Iterator[Any]) -> Any:
    parts: dict[str, Any] = {}
    for name, kind in _kinds(cls):
        if is_dataclass(kind):
            parts[name] = _build(kind, leaves)
        else:
            leaf = next(leaves)
            parts[name] = leaf.item() if kind is int else leaf
    return cls(**parts)


@cache
def _kinds(cls: Any) -> list[tuple[str, Any]]:
    """Each field of a dataclass, with what it holds where it is not None."""
    hints = get_type_hints(cls)

    def present(hint: Any) -> Any:
        if get_origin(hint) in (Union, types.UnionType):
            (hint,) = (member for member in get_args(hint) if member is not type(None))
        return hint

    return [(field.name, present(hints[field.name])) for field in fields(cls)]


def output_to_json(output: StepOutput) -> dict[str, Any]:
    """A result as lists of numbers."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    return {**values, "pooled": [row.tolist() for row in output.pooled]}


def output_from_json(values: dict[str, Any]) -> StepOutput:
    """The result of which ``output_to_json`` made this."""

    def score(logprob: float, rank: int, top_ids: list[int], top_logprobs: list[float]) -> TokenScore:
        return TokenScore(logprob, rank, tuple(top_ids), tuple(top_logprobs))

    values["token_scores"] = [score(*one) for one in values["token_scores"]]
    values["pooled"] = [np.array(row, dtype=np.float32) for row in values["pooled"]]
    values["scores"] = [score(*one) for one in values["scores"]]
    return StepOutput(**values)


def pack_message(message: dict[str, Any]) -> bytes:
    """Whatever else is said, as JSON."""
    return json.dumps(message).encode()


def unpack_message(data: bytes) -> dict[str, Any]:
    """The inverse of ``pack_message``."""
    message: dict[str, Any] = json.loads(data)
    return message
