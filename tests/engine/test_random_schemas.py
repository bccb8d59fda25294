"""Random JSON schemas, and models of random weights that follow them at a high temperature: what is finished is valid.

Whether it is, says the package jsonschema, which reads schemas in its own way.
"""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mini_infer import LLMEngine, SamplingParams, StructuredOutputsParams
from mini_infer.exceptions import DeadEndError, InvalidRequestError

from .checkpoints import make_engine_checkpoint

NAMES = ("a", "id", "name", "名字", "x y", 'q"', "properties", "type", "$ref", "longer_name_of_a_property")


def draw_schema(draw: random.Random, depth: int = 0) -> Any:
    """Mostly small ones; some contradict themselves, and some say what few implementations know."""
    leaves = [string, number, constant, enumeration, lambda d: {"type": draw.choice(["boolean", "null"])}]
    if depth < 3 and draw.random() < (0.9 if depth == 0 else 0.4):
        inner = [draw_object, draw_array, alternatives, lambda d, _: {"$ref": "#/$defs/leaf"}]
        return draw.choices(inner, [6, 3, 2, 1])[0](draw, depth + 1)
    return draw.choice(leaves)(draw)


def string(draw: random.Random) -> Any:
    schema: dict[str, Any] = {"type": "string", "maxLength": draw.randint(0, 8)}
    if draw.random() < 0.3:
        schema["minLength"] = draw.randint(0, 9)
    if draw.random() < 0.2:
        return {"type": "string", "pattern": draw.choice(["^[a-c]{1,3}$", "^(x|yy)+z$", r"^\d{2}$", "^$"])}
    if draw.random() < 0.2:
        return {"type": "string", "format": draw.choice(["date", "time", "ipv4", "uuid"])}
    return schema


def number(draw: random.Random) -> Any:
    schema: dict[str, Any] = {"type": draw.choice(["integer", "number"])}
    low = draw.randint(-200, 200)
    if draw.random() < 0.8:
        schema[draw.choice(["minimum", "exclusiveMinimum"])] = low
        schema[draw.choice(["maximum", "exclusiveMaximum"])] = low + draw.randint(-1, 300)
    if schema["type"] == "integer" and draw.random() < 0.2:
        schema["multipleOf"] = draw.randint(1, 12)
    return schema


def constant(draw: random.Random) -> Any:
    return {"const": draw.choice([0, -1.5, "", 'é\n"\\', None, [1, []], {"k": {"v": "值"}}])}


def enumeration(draw: random.Random) -> Any:
    return {"enum": draw.sample([1, 2.5, "one", "二", True, None, [], {"a": 1}], draw.randint(1, 4))}


def draw_object(draw: random.Random, depth: int) -> Any:
    names = draw.sample(NAMES, draw.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw_schema(draw, depth) for name in names}}
    if draw.random() < 0.8:
        schema["required"] = draw.sample(names, draw.randint(0, len(names)))
    if draw.random() < 0.3:
        schema["additionalProperties"] = draw.choice([False, {"type": "integer", "minimum": 0, "maximum": 9}])
    if draw.random() < 0.05:
        schema["required"] = [*schema.get("required", ()), "missing"]
    return schema


def draw_array(draw: random.Random, depth: int) -> Any:
    most = draw.randint(0, 3)
    schema: dict[str, Any] = {"type": "array", "items": draw_schema(draw, depth), "maxItems": most}
    if draw.random() < 0.4:
        schema["minItems"] = draw.randint(0, most + 1)
    if draw.random() < 0.2:
        schema["prefixItems"] = [draw_schema(draw, depth)]
    return schema


def alternatives(draw: random.Random, depth: int) -> Any:
    parts = [draw_schema(draw, depth) for _ in range(draw.randint(1, 3))]
    return {draw.choices(["anyOf", "allOf", "oneOf"], [6, 2, 1])[0]: parts}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1, max_position_embeddings=512)


def check(checkpoint: Path, seed: int, count: int) -> None:
    print("seed", seed)
    draw = random.Random(seed)
    with LLMEngine(model=checkpoint, dtype="float32", device="cpu", num_gpu_blocks=800, max_num_seqs=32) as engine:
        requests, refused = [], 0
        for place in range(count):
            schema = draw_schema(draw) | {"$defs": {"leaf": {"type": "integer", "minimum": 0, "maximum": 9}}}
            structured = StructuredOutputsParams(json=schema)
            params = SamplingParams(temperature=2.0, seed=place, max_tokens=300, structured_outputs=structured)
            try:
                request = engine.make_request([1, 2, 3], params)
            except InvalidRequestError:
                refused += 1
                continue
            engine.submit(request)
            requests.append((request, schema))
        while not all(request.finished for request, _ in requests):
            engine.step()
        assert engine.stats().num_used_blocks == 0
    ends = {"stop": 0, "length": 0, "error": 0}
    for request, schema in requests:
        (completion,) = request.output().outputs
        ends[completion.finish_reason] += 1
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), schema)
        elif completion.finish_reason == "error":
            assert isinstance(request.error, DeadEndError)
    print(f"{count} schemas: {refused} refused,", ends)
    assert ends["stop"] > count / 2


def test_what_is_finished_is_valid(checkpoint: Path) -> None:
    check(checkpoint, seed=1, count=60)


@pytest.mark.slow
def test_what_is_finished_is_valid_at_length(checkpoint: Path) -> None:
    check(checkpoint, seed=2, count=1000)
