"""``/v1/embeddings`` through the official client: the vectors of the offline engine, at length 1."""

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from mini_infer import LLM

from .test_http import assert_error

PATH = "/v1/embeddings"
TEXTS = ["What is a KV cache?", "什么是块？", "Once"]


def unit(vector: Any) -> Any:
    return np.array(vector) / np.linalg.norm(vector)


@pytest.mark.parametrize("encoding", ["float", "base64", None])  # None is the client's own choice
@pytest.mark.parametrize("as_ids", [False, True])
def test_as_offline(client: openai.OpenAI, offline: LLM, encoding: Any, as_ids: bool) -> None:
    texts: Any = [offline.tokenize(text) for text in TEXTS] if as_ids else TEXTS
    options = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model="tutor", input=texts, **options)
    expected = offline.embed(TEXTS)
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, output in zip(answer.data, expected, strict=True):
        vector = item.embedding
        if encoding == "base64":
            vector = np.frombuffer(base64.b64decode(vector), dtype="<f4")  # type: ignore[arg-type]
        assert np.abs(np.array(vector) - unit(output.embedding)).max() < 1e-5
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens
    assert answer.usage.total_tokens == sum(len(output.prompt_token_ids) for output in expected)
    assert answer.model == "tutor" and answer.object == "list"


@pytest.mark.parametrize("as_ids", [False, True])
def test_one(client: openai.OpenAI, offline: LLM, as_ids: bool) -> None:
    text: Any = offline.tokenize(TEXTS[0]) if as_ids else TEXTS[0]
    (item,) = client.embeddings.create(model="tutor", input=text).data
    assert np.abs(np.array(item.embedding) - unit(offline.embed(TEXTS[0])[0].embedding)).max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input must be a text, token ids, or a list of either"),
        ({"input": [[]]}, "empty"),
        ({"input": ["x", 1]}, "input must be"),
        ({"input": "one two three four " * 2000}, "context_length_exceeded"),
        ({"input": ["x"] * 1025}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"model": "gpt-4"}, "'gpt-4'"),
        ({"temperature": 1}, "temperature"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refused_by_name(http: httpx.Client, fields: dict[str, Any], named: str) -> None:
    answer = http.post(PATH, json={"input": "x"} | fields)
    error = assert_error(answer, 404 if "model" in fields else 400)
    assert named in error["message"] or error["param"] == named, error


def test_the_models_own_dimensions(http: httpx.Client, offline: LLM) -> None:
    size = offline.model_config.hidden_size
    answer = http.post(PATH, json={"input": "x", "dimensions": size})
    assert len(answer.json()["data"][0]["embedding"]) == size
