"""What goes over the wire comes out as it was, to the bit."""

import json
import math
import random
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from mini_infer.executor.wire import output_from_json, output_to_json, pack_step, unpack_step
from mini_infer.step import Draws, Keeps, LogitEdits, Pools, Scores, StepInput, StepOutput, TokenScore


def draw_array(draw: random.Random, hint: Any, length: int) -> np.ndarray:
    rng = np.random.default_rng(draw.randrange(2**32))
    text = str(hint)
    if "float" in text:
        return rng.normal(size=length) * 10.0 ** draw.randint(-300, 300)
    dtype = (
        np.uint64 if "uint64" in text else np.uint8 if "uint8" in text else np.int32 if "int32" in text else np.int64
    )
    return rng.integers(0, np.iinfo(dtype).max, size=length, dtype=dtype, endpoint=True)


def draw_value(draw: random.Random, cls: type) -> Any:
    parts = {}
    for field in fields(cls):
        if field.type in (Draws, Scores, LogitEdits, Pools, Keeps):
            parts[field.name] = draw_value(draw, field.type)
        elif field.type is int:
            parts[field.name] = draw.randrange(2**40)
        elif field.name == "masks":
            parts[field.name] = draw_array(draw, field.type, 39).reshape(-1, 13)
        elif field.name in ("swap_out", "copy", "swap_in"):
            parts[field.name] = draw_array(draw, np.int64, 2 * draw.choice((0, 1, 5))).reshape(-1, 2)
        else:
            parts[field.name] = draw_array(draw, field.type, draw.choice((0, 1, 3, 64)))
    return cls(**parts)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    else:
        assert one == other


@pytest.mark.parametrize("seed", range(20))
def test_a_step(seed: int) -> None:
    step = draw_value(random.Random(seed), StepInput)
    there = unpack_step(pack_step(step))
    assert_same(step, there)
    there.token_ids[:] = 0  # what tensors are made of can be written to


def test_a_result() -> None:
    numbers = [0.1, -1e-320, math.pi, -math.inf, -0.0]
    output = StepOutput(
        token_ids=[1, 2, 3],
        logprobs=numbers[:3],
        token_scores=[TokenScore(numbers[3], 3, (5, 6), (numbers[4], 1e300))],
        scores=[TokenScore(numbers[2], 1, (), ())],
        pooled=[np.array([0.1, -1e-40, 3e38], dtype=np.float32)],
    )
    there = output_from_json(json.loads(json.dumps(output_to_json(output))))
    assert there.pooled[0].dtype == np.float32 and there.pooled[0].tobytes() == output.pooled[0].tobytes()
    assert replace(there, pooled=[]) == replace(output, pooled=[]) and str(there) == str(output)
    nan = StepOutput([0], [math.nan], [], [])
    (logprob,) = output_from_json(json.loads(json.dumps(output_to_json(nan)))).logprobs
    assert math.isnan(logprob)
