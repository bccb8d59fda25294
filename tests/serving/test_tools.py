"""The official client calls tools and asks for forms of answers, from models that were never taught either.

A model of random weights writes nonsense, so whatever is well formed here is so for certain.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest

from mini_infer import AsyncLLMEngine, EngineConfig
from tests.engine.checkpoints import CHAT_TEMPLATE, make_engine_checkpoint

from .running import Running, running

QUESTION: Any = [{"role": "user", "content": "How much memory does it need?"}]

SIZE: Any = {
    "type": "function",
    "function": {
        "name": "kv_cache_size",
        "description": "Bytes of a KV cache.",
        "parameters": {
            "type": "object",
            "properties": {
                "tokens": {"type": "integer", "minimum": 0, "maximum": 9999},
                "dtype": {"enum": ["float32", "bfloat16"]},
            },
            "required": ["tokens"],
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
TOOLS = [SIZE, NOW]

TEMPLATES = {
    "hermes": '{% if tools %}<tools>{{ tools | tojson }}</tools> answer with <tool_call>{"name": ..}{% endif %}',
    "llama3": '{% if tools %}{{ tools | tojson }} answer with {"name": .., "parameters": ..}{% endif %}',
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[TOOL_CALLS]{% endif %}",
    "mistral-args": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[TOOL_CALLS]x[ARGS]{% endif %}",
    "generic": "",
}


@pytest.fixture(scope="module", params=TEMPLATES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A random model whose template shows tools in the way of a family."""
    path = make_engine_checkpoint(
        tmp_path_factory.mktemp(request.param), num_hidden_layers=1, max_position_embeddings=2048
    )
    (path / "chat_template.jinja").write_text(TEMPLATES[request.param] + CHAT_TEMPLATE)
    config = EngineConfig(model=path, dtype="float32", device="cpu", num_gpu_blocks=400)
    with running(AsyncLLMEngine(config), served_model_name="random") as server:
        yield server
        assert server.is_idle()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    common = {"model": "random", "messages": QUESTION, "temperature": 1.0, "seed": 3, "max_tokens": 200}
    return client.chat.completions.create(**{**common, **options})


def check_call(call: Any) -> None:
    assert call.type == "function" and call.function.name in ("kv_cache_size", "now")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "now":
        assert arguments == {}
    else:
        jsonschema.validate(arguments, SIZE["function"]["parameters"])


class TestTools:
    @pytest.mark.parametrize("seed", range(2))
    def test_required(self, client: openai.OpenAI, seed: int) -> None:
        (choice,) = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        check_call(call)

    def test_a_named_one(self, client: openai.OpenAI) -> None:
        for name in ("now", "kv_cache_size"):
            chosen = {"type": "function", "function": {"name": name}}
            (choice,) = ask(client, tools=TOOLS, tool_choice=chosen).choices
            (call,) = choice.message.tool_calls
            check_call(call)
            assert call.function.name == name

    def test_one_of_a_selection(self, client: openai.OpenAI) -> None:
        chosen = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
        choice = ask(
            client,
            tools=TOOLS,
            tool_choice={"type": "allowed_tools", "allowed_tools": chosen},
            parallel_tool_calls=False,
        ).choices[0]
        assert [call.function.name for call in choice.message.tool_calls] == ["now"]

    def test_several_at_once(self, client: openai.OpenAI) -> None:
        """As many as the model likes; those that are whole are well formed."""
        answer = ask(client, tools=TOOLS, tool_choice="required", n=2, max_tokens=150)
        calls = [choice.message.tool_calls for choice in answer.choices]
        for choice, made in zip(answer.choices, calls, strict=True):
            for call in made if choice.finish_reason == "tool_calls" else made[:-1]:
                check_call(call)
            assert len({call.id for call in made}) == len(made)

    def test_none(self, client: openai.OpenAI) -> None:
        with_tools = ask(client, tools=TOOLS, tool_choice="none", max_tokens=20).choices[0]
        without = ask(client, max_tokens=20).choices[0]
        assert with_tools.message.tool_calls is None and with_tools.message.content == without.message.content

    def test_auto(self, client: openai.OpenAI) -> None:
        """A random model calls by chance alone; it is free to, and whatever it says arrives."""
        for choice in ask(client, tools=TOOLS, n=3, max_tokens=30).choices:
            assert choice.message.content or choice.message.tool_calls

    @pytest.mark.parametrize("options", [{"tool_choice": "required"}, {"tool_choice": "auto"}, {}])
    def test_a_stream_says_what_the_whole_says(self, client: openai.OpenAI, options: Any) -> None:
        asked = {"tools": TOOLS, "n": 2, "max_tokens": 100, **options}
        whole = ask(client, **asked)
        made: dict[int, dict[str, Any]] = {i: {"content": "", "calls": [], "reason": None} for i in range(2)}
        for chunk in ask(client, **asked, stream=True):
            for choice in chunk.choices:
                so_far = made[choice.index]
                so_far["content"] += choice.delta.content or ""
                for piece in choice.delta.tool_calls or ():
                    if piece.id is not None:  # the first of each call, and no other
                        assert piece.index == len(so_far["calls"]) and piece.type == "function"
                        so_far["calls"].append([piece.function.name, ""])
                    so_far["calls"][piece.index][1] += piece.function.arguments
                assert so_far["reason"] is None
                so_far["reason"] = choice.finish_reason
        for choice in whole.choices:
            calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]
            expected = {"content": choice.message.content or "", "calls": calls, "reason": choice.finish_reason}
            assert made[choice.index] == expected

    def test_a_whole_conversation(self, client: openai.OpenAI) -> None:
        """What the client makes of an answer goes back as it is, with the results of the calls."""
        first = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
        (call,) = first.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "4096"}
        second = ask(client, messages=[*QUESTION, first, result], tools=TOOLS, max_tokens=10).choices[0].message
        assert second.content or second.tool_calls
        plain = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
        assert ask(client, messages=[*QUESTION, plain, result], max_tokens=5).choices[0].message.content is not None

    def test_with_a_form_for_answers_without_calls(self, client: openai.OpenAI) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
        for choice in ask(client, tools=TOOLS, response_format=form, n=4, parallel_tool_calls=False).choices:
            if choice.message.tool_calls:
                check_call(choice.message.tool_calls[0])
            else:
                assert json.loads(choice.message.content) in (1, 2)

    @pytest.mark.parametrize("server", ["hermes"], indirect=True)
    @pytest.mark.parametrize(
        "options, words",
        [
            ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names 'x'"),
            ({"tool_choice": "required"}, "no tools"),
            ({"tools": [NOW, NOW]}, "two tools are called 'now'"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tool's name"),
            ({"tools": [{"type": "retrieval"}]}, "function"),
            ({"functions": [{"name": "x"}]}, "give tools instead"),
            ({"messages": [{"role": "assistant", "content": None}]}, "Field required"),
            ({"messages": [{"role": "tool"}]}, "Field required"),
        ],
    )
    def test_what_cannot_be(self, client: openai.OpenAI, options: Any, words: str) -> None:
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, **options)


class Memory(pydantic.BaseModel):
    """What ``parse`` is to fill in."""

    blocks: int = pydantic.Field(ge=0, le=500)
    kind: str = pydantic.Field(max_length=8)


@pytest.mark.parametrize("server", ["hermes"], indirect=True)
class TestForms:
    def test_parse(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(
            model="random", messages=QUESTION, response_format=Memory, temperature=1.5, seed=1, max_tokens=200
        )
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, Memory) and answer.choices[0].finish_reason == "stop"

    def test_json_object(self, client: openai.OpenAI) -> None:
        answer = ask(client, response_format={"type": "json_object"}, logit_bias={"92": 5}, max_tokens=60)
        assert (answer.choices[0].message.content or "").startswith("{")

    def test_text(self, client: openai.OpenAI) -> None:
        plain = ask(client, max_tokens=9).choices[0].message.content
        assert ask(client, max_tokens=9, response_format={"type": "text"}).choices[0].message.content == plain

    @pytest.mark.parametrize(
        "extra, texts",
        [
            ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no")),
            ({"structured_outputs": {"regex": "a|b"}}, ("a", "b")),
            ({"guided_choice": ["yes", "no"]}, ("yes", "no")),
            ({"guided_regex": "a|b"}, ("a", "b")),
            ({"guided_json": {"enum": [1]}}, ("1",)),
            ({"guided_grammar": 'start: "x" | "y"'}, ("x", "y")),
        ],
    )
    def test_extensions(self, client: openai.OpenAI, extra: Any, texts: tuple[str, ...]) -> None:
        assert ask(client, extra_body=extra).choices[0].message.content in texts
        answer = client.completions.create(model="random", prompt="x", extra_body=extra, max_tokens=20)
        assert answer.choices[0].text in texts

    @pytest.mark.parametrize(
        "extra, words",
        [
            ({"response_format": {"type": "json_schema"}}, "needs"),
            ({"response_format": {"type": "xml"}}, "response_format"),
            ({"guided_regex": "(", "guided_choice": ["x"]}, "structured outputs need one"),
            ({"guided_regex": "("}, "structured outputs"),
            ({"guided_regex": "x", "response_format": {"type": "json_object"}}, "say the same"),
            ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
            ({"structured_outputs": {"json": {"multipleOf": 999983}}}, "multipleOf"),
        ],
    )
    def test_what_cannot_be(self, client: openai.OpenAI, server: Running, extra: Any, words: str) -> None:
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, extra_body=extra)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", **extra}, timeout=60)
        assert answer.status_code == 400
