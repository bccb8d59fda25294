"""A diffusion model behind the routes that others have."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mini_infer import LLM, AsyncLLMEngine, EngineConfig, SamplingParams
from tests.engine.checkpoints import save_tokenizer
from tests.models.llada import make_llada_checkpoint

from .running import Running, running
from .test_http import assert_error
from .test_results import fetch


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_llada_checkpoint(tmp_path_factory.mktemp("llada"), 4)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def offline(path: Path) -> LLM:
    return LLM(path, device="cpu")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with running(AsyncLLMEngine(EngineConfig(model=path, device="cpu"))) as server:
        yield server
        assert server.is_idle()


def test_the_fields_of_the_plain_routes(http: httpx.Client, offline: LLM) -> None:
    fields = {"temperature": 0.7, "gen_length": 20, "steps": 10, "cfg_scale": 0.5, "remasking": "random", "seed": 5}
    fields["sparse_config"] = {"retention_ratio": 0.3, "default_block_len": 5}
    (number,) = http.post("/v1/generate", json={"prompt": "Tell me about AI", **fields}).json()["request_ids"]
    expected = offline.generate("Tell me about AI", SamplingParams(**fields))[0]  # type: ignore[arg-type]
    assert fetch(http, number)["text"] == expected.text
    numbers = http.post("/v1/generate_batch", json={"prompts": ["Prompt 1", "Prompt 2"], **fields}).json()[
        "request_ids"
    ]
    outputs = offline.generate(["Prompt 1", "Prompt 2"], SamplingParams(**fields))  # type: ignore[arg-type]
    assert [fetch(http, number)["text"] for number in numbers] == [output.text for output in outputs]


def test_max_tokens_is_the_canvas_of_a_chat(client: openai.OpenAI, offline: LLM, path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model=path.name, messages=messages, max_tokens=12, temperature=0)  # type: ignore[call-overload]
    expected = offline.chat(messages, SamplingParams(temperature=0, gen_length=12, steps=12))
    assert answer.choices[0].message.content == expected[0].text


def test_the_written_prefix_streams(client: openai.OpenAI, offline: LLM, path: Path) -> None:
    stream = client.completions.create(
        model=path.name,
        prompt="Once",
        max_tokens=24,
        temperature=0,
        stream=True,
        extra_body={"block_length": 6, "steps": 8},
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    params = SamplingParams(temperature=0, gen_length=24, steps=8, block_length=6)
    assert "".join(pieces) == offline.generate("Once", params)[0].text
    assert len([piece for piece in pieces if piece]) > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"gen_length": 10_000},
        {"steps": 0},
        {"remasking": "x"},
        {"cfg_scale": -1.0},
        {"gen_length": 300},
        {"sparse_config": 0.5},
        {"sparse_config": {"retention_ratio": 2}},
        {"sparse_config": {"ratio": 0.5}},
    ],
    ids=str,
)
def test_bad_values_are_refused(http: httpx.Client, fields: dict[str, object]) -> None:
    assert_error(http.post("/v1/generate", json={"prompt": "x", **fields}), 422)


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_stream_shows_the_canvas_after_every_step_if_asked_to(http: httpx.Client, route: str) -> None:
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if "chat" in route else {"prompt": "Hello"}
    body = {**asked, "stream": True, "max_tokens": 12, "steps": 6, "temperature": 0, "ignore_eos": True}

    def choices(**options: bool) -> list[dict[str, Any]]:
        with http.stream("POST", f"/v1/{route}", json={**body, "stream_options": options}) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
        return [choice for line in lines for choice in json.loads(line)["choices"]]

    plain = choices()
    assert not any("canvas" in choice for choice in plain)
    shown = [choice["canvas"] for choice in choices(include_canvas=True) if "canvas" in choice]
    assert [canvas.count(None) for canvas in shown] == [10, 8, 6, 4, 2, 0]
    text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in plain)
    assert "".join(shown[-1]) == text
