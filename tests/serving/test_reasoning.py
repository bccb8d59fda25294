"""Thinking told apart from answering: in pieces of any size, and over HTTP."""

import random
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from mini_infer import AsyncLLMEngine
from mini_infer.exceptions import InvalidRequestError
from mini_infer.serving.reasoning import Thinking, num_reasoning_tokens, switches, thinks

from .running import Running, running
from .test_http import assert_error
from .thinking import TEMPLATE, save_tokenizer, saying

QUESTION: Any = [{"role": "user", "content": "What is a KV cache?"}]

CASES = [
    ("", "<think>\nHm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
    ("", "\n <think>Hm.</think>Yes.", ("Hm.", "Yes.")),
    ("", "<think>\n\n</think>\n\nYes.", ("", "Yes.")),
    ("", "<think>a < b </ c\n\nand more", ("a < b </ c\n\nand more", "")),
    ("", "<think>", ("", "")),
    ("", "<thin", ("", "<thin")),
    ("", "<thinking> is no mark", ("", "<thinking> is no mark")),
    ("", "  Yes, <think> no </think>", ("", "  Yes, <think> no </think>")),
    ("", "", ("", "")),
    ("x<think>\n", "Hm.\n\nHm!  \n</think>\n\n\nYes.\n", ("Hm.\n\nHm!", "Yes.\n")),
    ("x<think>", "Hm.</think", ("Hm.</think", "")),
    ("x<think>\n", "</think>Yes.</think>", ("", "Yes.</think>")),
    ("x<think>\n\n</think>\n\n", "Yes.", ("", "Yes.")),
]


@pytest.mark.parametrize(("prompt", "text", "expected"), CASES)
def test_in_pieces_of_any_size(prompt: str, text: str, expected: tuple[str, str]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    assert Thinking(prompt).feed(text, is_last=True) == expected
    for _ in range(50):
        thinking, left, reasoning, content = Thinking(prompt), text, "", ""
        while left:
            size = rng.choice([0, 1, 2, 5])
            piece = thinking.feed(left[:size], is_last=False)
            assert not (piece.reasoning and content), "what was thought comes before the answer"
            reasoning, content, left = reasoning + piece.reasoning, content + piece.content, left[size:]
        piece = thinking.feed("", is_last=True)
        assert (reasoning + piece.reasoning, content + piece.content) == expected


@pytest.mark.parametrize(("prompt", "text", "expected"), CASES)
def test_how_many_tokens_were_thought(prompt: str, text: str, expected: tuple[str, str]) -> None:
    def byte(token_id: int) -> bytes:
        return bytes([token_id])

    count = num_reasoning_tokens(text, prompt, text.encode(), byte)
    if "<think>" in prompt + text and not expected[1].endswith(text):
        assert text[count:].lstrip("\n") == expected[1]
    else:
        assert count == 0


def test_switches() -> None:
    assert thinks(TEMPLATE) and not thinks("{{ messages }}")
    assert switches(TEMPLATE, None) == {}
    assert switches(TEMPLATE, "none") == {"enable_thinking": False}
    assert switches(TEMPLATE, "high") == {"enable_thinking": True}
    assert switches("{{ reasoning_effort }}", "low") == {"reasoning_effort": "low"}
    assert switches("{{ messages }}", "none") == {}, "it asks for nothing"
    with pytest.raises(InvalidRequestError, match="reasoning_effort='low' is not supported by this model"):
        switches("{{ messages }}", "low")
    with pytest.raises(InvalidRequestError, match="reasoning_effort must be one of none"):
        switches(TEMPLATE, "much")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = save_tokenizer(tmp_path_factory.mktemp("thinker"))
    with running(AsyncLLMEngine(tokenizer=str(directory), num_gpu_blocks=128, max_model_len=512)) as server:
        yield server


@pytest.fixture
def client(thinker: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="any", max_retries=0) as client:
        yield client


class TestChats:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("said", "reasoning", "content"),
        [
            ("<think>\nThe user asks.\n</think>\n\nA cache of keys.", "The user asks.", "A cache of keys."),
            ("A cache of keys.", "", "A cache of keys."),
        ],
    )
    def test_apart(
        self, thinker: Running, client: openai.OpenAI, stream: bool, said: str, reasoning: str, content: str
    ) -> None:
        options: Any = {"model": "tutor", "messages": QUESTION}
        with saying(thinker.engine.engine, said):
            if stream:
                chunks = list(
                    client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
                )
                deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks if chunk.choices]
                thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
                text, usage = "".join(delta["content"] or "" for delta in deltas), chunks[-1].usage
            else:
                answer = client.chat.completions.create(**options)
                message = answer.choices[0].message.model_dump()
                thought, text, usage = message["reasoning_content"] or "", message["content"], answer.usage
        assert (thought, text) == (reasoning, content)
        assert usage is not None and usage.completion_tokens_details is not None
        whole = thinker.engine.tokenize(said, add_special_tokens=False)
        thoughts = usage.completion_tokens_details.reasoning_tokens
        assert thoughts is not None and (0 < thoughts < len(whole) if reasoning else thoughts == 0)

    def test_a_prompt_that_begins_to_think(self, thinker: Running, client: openai.OpenAI) -> None:
        with saying(thinker.engine.engine, "Hm.\n</think>\n\nYes."):
            answer = client.chat.completions.create(
                model="tutor", messages=QUESTION, extra_body={"chat_template_kwargs": {"forced": 1}}
            )
        message = answer.choices[0].message.model_dump()
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")

    def test_cut_while_thinking(self, thinker: Running, client: openai.OpenAI) -> None:
        with saying(thinker.engine.engine, "<think>\nOn and on and on and on and on."):
            answer = client.chat.completions.create(model="tutor", messages=QUESTION, max_tokens=12)
        message = answer.choices[0].message.model_dump()
        assert answer.choices[0].finish_reason == "length"
        assert message["reasoning_content"].startswith("On and") and message["content"] == ""


class TestSwitches:
    def rendered(self, thinker: Running, body: dict[str, Any]) -> list[int]:
        answer = httpx.post(f"{thinker.url}/tokenize", json=body).json()
        return answer["tokens"]  # type: ignore[no-any-return]

    @pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True), (None, True)])
    def test_effort(self, thinker: Running, client: openai.OpenAI, effort: Any, thinks: bool) -> None:
        answer = client.chat.completions.create(
            model="tutor", messages=QUESTION, max_tokens=1, extra_body={"reasoning_effort": effort}
        )
        body = {"messages": QUESTION, "chat_template_kwargs": {"enable_thinking": thinks}}
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(self.rendered(thinker, body))

    def test_the_templates_own_variable_goes_before(self, thinker: Running, client: openai.OpenAI) -> None:
        extra = {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}
        answer = client.chat.completions.create(model="tutor", messages=QUESTION, max_tokens=1, extra_body=extra)
        body = {"messages": QUESTION, "chat_template_kwargs": {"enable_thinking": False}}
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(self.rendered(thinker, body))

    def test_what_was_thought_goes_back_to_the_template(self, thinker: Running) -> None:
        messages = [*QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, *QUESTION]
        text = thinker.engine.detokenize(self.rendered(thinker, {"messages": messages}))
        assert "<think>\nHm.\n</think>\n\nYes." in text

    def test_a_template_without_one(self, http: httpx.Client) -> None:
        for effort in ("high", "much", 5):
            body = {"messages": QUESTION, "reasoning_effort": effort}
            error = assert_error(http.post("/v1/chat/completions", json=body), 400)
            assert "reasoning_effort" in error["message"]
