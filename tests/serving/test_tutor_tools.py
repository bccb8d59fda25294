"""The bundled tutor calls tools: the whole loop, offline, as a program of the official client runs it."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from mini_infer import LLM
from mini_infer.cli.functions import Functions

FUNCTIONS = Functions.of_file(Path(__file__).parents[2] / "examples" / "tools.py")
TOOLS: Any = [tool.for_template() for tool in FUNCTIONS.tools]

SIZE = {"layers": 28, "kv_heads": 8, "head_dim": 128, "tokens": 4096}
BLOCKS = {"tokens": 1000, "block_size": 16}
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "term": ("Look up chunked prefill.", "lookup_term", {"term": "chunked prefill"}, "several steps"),
    "size": (
        "How large is the KV cache of 4096 tokens with 28 layers, 8 KV heads and head_dim 128?",
        "kv_cache_size",
        SIZE,
        "469762048",
    ),
    "blocks": ("How many blocks do 1000 tokens need with a block size of 16?", "count_blocks", BLOCKS, "63"),
    "term in Chinese": ("查一下连续批处理。", "lookup_term", {"term": "连续批处理"}, "每一步"),
    "size in Chinese": (
        "28 层、8 个 KV 头、head_dim 为 128，4096 个词元的 KV 缓存有多大？",
        "kv_cache_size",
        SIZE,
        "469762048",
    ),
    "blocks in Chinese": ("块大小为 16 时，1000 个词元需要几个块？", "count_blocks", BLOCKS, "63"),
}


def ask(client: openai.OpenAI, messages: list[Any], stream: bool = False, **options: Any) -> tuple[Any, str | None]:
    """The answer as a message to send back, and why it ended; of a stream, what its pieces make."""
    asked: Any = {
        "model": "tutor",
        "messages": messages,
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": 200,
        **options,
    }
    if not stream:
        (choice,) = client.chat.completions.create(**asked).choices
        return choice.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}), (
            choice.finish_reason
        )
    with client.chat.completions.stream(**asked) as events:
        (choice,) = events.get_final_completion().choices
    calls: list[Any] = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in choice.message.tool_calls or ()
    ]
    message = {"role": "assistant", "content": choice.message.content} | ({"tool_calls": calls} if calls else {})
    return message, choice.finish_reason


def test_the_template_offers_them(offline: LLM) -> None:
    assert offline.tokenizer.tool_format.knows_tools


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_loop(client: openai.OpenAI, case: tuple[str, str, dict[str, Any], str], stream: bool) -> None:
    """A question, a call, its result, and an answer that says it."""
    question, name, arguments, told = case
    messages: list[Any] = [{"role": "user", "content": question}]
    message, reason = ask(client, messages, stream)
    assert reason == "tool_calls" and not message.get("content")
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (name, arguments)
    result = FUNCTIONS.call(name, call["function"]["arguments"])
    assert told in result
    messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": result}]
    answer, reason = ask(client, messages, stream)
    assert reason == "stop" and "tool_calls" not in answer
    assert told in answer["content"]


def test_what_needs_no_tool_is_answered(client: openai.OpenAI) -> None:
    message, reason = ask(client, [{"role": "user", "content": "What is a KV cache?"}])
    assert reason == "stop" and "keys and values" in message["content"] and "tool_calls" not in message


def test_a_required_call_is_the_same_one(client: openai.OpenAI) -> None:
    """A grammar that holds the tutor to the format has nothing to correct."""
    question, name, arguments, _ = CASES["blocks"]
    message, reason = ask(client, [{"role": "user", "content": question}], tool_choice="required")
    made = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert reason == "tool_calls" and made == [(name, arguments)]
