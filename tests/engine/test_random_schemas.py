"""Random JSON schemas, and models of random weights that follow them at a high temperature: what is finished is valid.

Whether it is, says the package jsonschema, which reads schemas in its own way.
"""

import json
import random
from pathlib import Path

import jsonschema
import pytest

from benchmarks.schemas import draw_schema
from mini_infer import LLMEngine, SamplingParams, StructuredOutputsParams
from mini_infer.exceptions import DeadEndError, InvalidRequestError

from .checkpoints import make_engine_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1, max_position_embeddings=512)


def check(checkpoint: Path, seed: int, count: int) -> None:
    print("seed", seed)
    draw = random.Random(seed)
    with LLMEngine(model=checkpoint, dtype="float32", device="cpu", num_gpu_blocks=800, max_num_seqs=32) as engine:
        requests, refused = [], 0
        for place in range(count):
            schema = draw_schema(draw)
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
