"""Small things that real clients read, send, or look for in a message."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

import mini_infer
from mini_infer import LLM, AsyncLLMEngine, SamplingParams
from mini_infer.compat.http import NEUTRAL
from mini_infer.config import BUNDLED_MODEL
from tests.engine.executors import PATIENCE

from .running import Running, running
from .test_http import assert_error

QUESTION: Any = [{"role": "user", "content": "What is a KV cache?"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


class TestTheFirstEvent:
    """Load generators take a stream's first event for its first token."""

    def test_a_chat_begins_with_its_first_token(self, server: Running, http: httpx.Client) -> None:
        body = json.dumps({"messages": QUESTION, "max_tokens": 2, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with server.held() as gate, socket.create_connection(server.address, timeout=PATIENCE) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert gate.was_reached.wait(PATIENCE)
            http.get("/version")  # so the server has said all that it has to say
            got = connection.recv(1 << 16)
            assert got.startswith(b"HTTP/1.1 200") and b"data:" not in got, "headers, and no event yet"
            gate.is_open.set()
            while b"data:" not in got:
                got += connection.recv(1 << 16)
            assert b'"role":"assistant"' in got


class TestContextLength:
    LONG = "one two three four " * 2000

    @pytest.mark.parametrize("text", [LONG, "one two " * 1000], ids=["by its characters", "by its tokens"])
    def test_in_the_words_that_programs_look_for(self, http: httpx.Client, text: str) -> None:
        for path, body in ((CHAT, {"messages": [{"role": "user", "content": text}]}), (COMPLETION, {"prompt": text})):
            error = assert_error(http.post(path, json=body), 400)
            assert error["code"] == "context_length_exceeded"
            assert error["message"].startswith("This model's maximum context length is 1024 tokens")
            assert "context_length_exceeded" in error["message"]

    def test_of_results(self, http: httpx.Client) -> None:
        assert assert_error(http.post("/v1/generate", json={"prompt": self.LONG}), 422)["code"] == (
            "context_length_exceeded"
        )

    def test_nothing_is_logged(self, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
        http.post(COMPLETION, json={"prompt": "one two " * 1000})
        assert "indexing errors" not in caplog.text


class TestModelCard:
    def test_root(self, http: httpx.Client, server: Running) -> None:
        (card,) = http.get("/v1/models").json()["data"]
        assert card["root"] == str(server.engine.config.model)

    def test_version(self, http: httpx.Client) -> None:
        assert http.get("/version").json() == {"version": mini_infer.__version__}


class TestUsage:
    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    @pytest.mark.parametrize("stream", [False, True])
    def test_cached_tokens(self, http: httpx.Client, path: str, stream: bool) -> None:
        prompt = f"{path} {stream} " + "word " * 60
        what = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
        body = what | {"max_tokens": 1, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}

        def usage() -> dict[str, Any]:
            answer = http.post(path, json=body)
            if not stream:
                return answer.json()["usage"]  # type: ignore[no-any-return]
            *_, last = [line for line in answer.text.split("\n\n") if line.startswith("data: {")]
            return json.loads(last.removeprefix("data: "))["usage"]  # type: ignore[no-any-return]

        first, second = usage(), usage()
        assert first["prompt_tokens"] == second["prompt_tokens"]
        found = second["prompt_tokens_details"]["cached_tokens"]
        assert 0 < found < second["prompt_tokens"] and found % 16 == 0
        assert first["prompt_tokens_details"]["cached_tokens"] < found

    def test_offline(self) -> None:
        with LLM(num_gpu_blocks=64, max_model_len=256, enable_prefix_caching=True) as llm:
            params = SamplingParams(max_tokens=1)
            first, second = (llm.generate("word " * 60, params)[0] for _ in range(2))
            assert (first.num_cached_tokens, second.num_cached_tokens) == (0, len(first.prompt_token_ids) // 16 * 16)


class TestTokenize:
    def test_what_a_load_generator_sends(self, http: httpx.Client, offline: LLM) -> None:
        answer = http.post("/tokenize", json={"model": "tutor", "prompt": "hi", "add_special_tokens": False}).json()
        assert answer["tokens"] == offline.tokenizer.hf.encode("hi", add_special_tokens=False)

    def test_of_a_tokenizer_that_adds_one(self, adding: Running) -> None:
        hf = adding.engine.tokenizer.hf
        for adds in (True, False):
            body = {"prompt": "hi", "add_special_tokens": adds}
            answer = httpx.post(f"{adding.url}/tokenize", json=body).json()
            assert answer["tokens"] == hf.encode("hi", add_special_tokens=adds)
        assert hf.encode("hi") != hf.encode("hi", add_special_tokens=False)

    def test_conversations(self, http: httpx.Client, offline: LLM) -> None:
        hf = offline.tokenizer.hf
        messages = [*QUESTION, {"role": "assistant", "content": "A KV cache"}]
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
            {"continue_final_message": True},
        ):
            answer = http.post("/tokenize", json={"messages": messages, **options}).json()
            theirs = {"add_generation_prompt": False} | options
            assert answer["tokens"] == hf.apply_chat_template(messages, return_dict=False, **theirs)

    def test_names(self, http: httpx.Client, offline: LLM) -> None:
        answer = http.post("/tokenize", json={"prompt": "什么是 KV?", "return_token_strs": True}).json()
        assert answer["token_strs"] == offline.tokenizer.hf.convert_ids_to_tokens(answer["tokens"])


class TestContinuing:
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_last_message(self, client: openai.OpenAI, offline: LLM, stream: bool) -> None:
        messages: Any = [*QUESTION, {"role": "assistant", "content": "A KV cache keeps"}]
        extra = {"continue_final_message": True, "add_generation_prompt": False}
        options: Any = {"model": "tutor", "messages": messages, "max_tokens": 8, "extra_body": extra}
        if stream:
            chunks = client.chat.completions.create(**options, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = client.chat.completions.create(**options).choices[0].message.content or ""
        ids = offline.tokenizer.hf.apply_chat_template(messages, continue_final_message=True, return_dict=False)
        assert text == offline.generate([ids], SamplingParams(temperature=0, max_tokens=8))[0].text

    def test_not_both(self, http: httpx.Client) -> None:
        body = {"messages": QUESTION, "continue_final_message": True, "add_generation_prompt": True}
        assert "one of them" in assert_error(http.post(CHAT, json=body), 400)["message"]
        body = {"messages": QUESTION, "chat_template_kwargs": {"continue_final_message": "yes"}}
        assert_error(http.post(CHAT, json=body), 400)


class TestStopReason:
    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    @pytest.mark.parametrize("stream", [False, True])
    def test_which_string_or_token(self, http: httpx.Client, offline: LLM, path: str, stream: bool) -> None:
        what = {"messages": QUESTION} if path == CHAT else {"prompt": "Once"}
        text = http.post(path, json=what | {"max_tokens": 12, "temperature": 0}).json()["choices"][0]
        text = text["message"]["content"] if path == CHAT else text["text"]
        token = offline.tokenize(text)[3]
        for how, reason in (
            ({"stop": ["\0never", text[5:8]]}, text[5:8]),
            ({"stop_token_ids": [token]}, token),
            ({"max_tokens": 2}, None),
        ):
            body = {"max_tokens": 12, "temperature": 0, "stream": stream} | what | how
            answer = http.post(path, json=body)
            if stream:
                last = answer.text.split("\n\n")[-3]
                choice = json.loads(last.removeprefix("data: "))["choices"][0]
            else:
                choice = answer.json()["choices"][0]
            assert choice["stop_reason"] == reason


class TestFingerprint:
    def test_the_same_in_every_answer_and_event(self, client: openai.OpenAI) -> None:
        options: Any = {"model": "tutor", "messages": QUESTION, "max_tokens": 2}
        whole = client.chat.completions.create(**options).system_fingerprint
        assert whole is not None and whole.startswith("fp_")
        assert {chunk.system_fingerprint for chunk in client.chat.completions.create(**options, stream=True)} == {whole}
        assert client.completions.create(model="tutor", prompt="Once", max_tokens=1).system_fingerprint == whole


class TestRequestIds:
    def test_errors_have_one(self, http: httpx.Client, client: openai.OpenAI) -> None:
        ids = [http.get(path).headers.get_list("x-request-id") for path in ("/nope", "/v1/models", "/v1/models/x")]
        assert all(len(found) == 1 for found in ids) and len({found for (found,) in ids}) == 3
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="gpt-4", prompt="x")
        assert caught.value.request_id

    @pytest.mark.parametrize("path", [COMPLETION, "/nope"])
    def test_the_callers_own_comes_back(self, http: httpx.Client, path: str) -> None:
        for given, is_taken in (("my-id/7", True), ("x" * 129, False), ("two words", False), ("", False)):
            body = {"prompt": "Once", "max_tokens": 1}
            (found,) = http.post(path, json=body, headers={"x-request-id": given}).headers.get_list("x-request-id")
            assert (found == given) is is_taken and found

    def test_two_requests_may_share_one(self, http: httpx.Client) -> None:
        answers = [
            http.post(COMPLETION, json={"prompt": "Once", "max_tokens": 1}, headers={"x-request-id": "same"}).json()
            for _ in range(2)
        ]
        assert answers[0]["id"] != answers[1]["id"]


class TestPaths:
    @pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/tutor/", "/health/", "/docs/", "//"])
    def test_a_slash_at_the_end(self, http: httpx.Client, path: str) -> None:
        assert http.get(path).status_code == 200

    def test_of_a_body(self, http: httpx.Client) -> None:
        assert http.post(COMPLETION + "/", json={"prompt": "Once", "max_tokens": 1}).status_code == 200


class TestNeutralValues:
    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    def test_are_accepted(self, http: httpx.Client, path: str) -> None:
        body: dict[str, Any] = {"messages": QUESTION} if path == CHAT else {"prompt": "Once"}
        for place in range(max(len(harmless) for harmless, _ in NEUTRAL.values())):
            fields = {name: harmless[place] for name, (harmless, _) in NEUTRAL.items() if place < len(harmless)}
            assert http.post(path, json=body | {"max_tokens": 1} | fields).status_code == 200, fields

    @pytest.mark.parametrize("name", NEUTRAL)
    def test_others_are_refused_by_name(self, http: httpx.Client, name: str) -> None:
        error = assert_error(http.post(CHAT, json={"messages": QUESTION, name: "something else"}), 400)
        assert name in error["message"] and error["param"] == name

    def test_of_a_chat(self, http: httpx.Client) -> None:
        fields = {"top_logprobs": 0, "prediction": {"type": "content", "content": "A"}, "prompt_cache_retention": "24h"}
        assert http.post(CHAT, json={"messages": QUESTION, "max_tokens": 1} | fields).status_code == 200


class TestWording:
    @pytest.mark.parametrize("prompt", [5, {"a": 1}, [1.5], [None], True, [["x"]], [1, "a"]])
    def test_of_prompts(self, http: httpx.Client, prompt: Any) -> None:
        error = assert_error(http.post(COMPLETION, json={"prompt": prompt}), 400)
        assert error["message"] == "prompt must be a text, token ids, or a list of either"
        assert error["param"] == "prompt"

    @pytest.mark.parametrize("stop", [5, {"a": 1}, [1], [["x"]], True])
    def test_of_stop_strings(self, http: httpx.Client, stop: Any) -> None:
        error = assert_error(http.post(COMPLETION, json={"prompt": "x", "stop": stop}), 400)
        assert (error["message"], error["param"]) == ("stop must be a string, or a list of strings", "stop")

    def test_no_prompts(self, http: httpx.Client) -> None:
        assert assert_error(http.post(COMPLETION, json={"prompt": []}), 400)["message"].startswith("prompt is an empty")

    def test_texts_and_ids_in_one_list(self, client: openai.OpenAI, offline: LLM) -> None:
        prompts: Any = ["Once", offline.tokenize("A block is")]
        answer = client.completions.create(model="tutor", prompt=prompts, max_tokens=4, temperature=0)
        expected = offline.generate(prompts, SamplingParams(max_tokens=4, temperature=0))
        assert [choice.text for choice in answer.choices] == [output.text for output in expected]

    def test_braces(self, http: httpx.Client) -> None:
        content = [{"type": "image_url", "image_url": {"url": "x"}}]
        error = assert_error(http.post(CHAT, json={"messages": [{"role": "user", "content": content}]}), 400)
        assert '{"type": "text"' in error["message"] and "{{" not in error["message"]

    def test_an_empty_salt(self, http: httpx.Client) -> None:
        error = assert_error(http.post(COMPLETION, json={"prompt": "x", "cache_salt": ""}), 400)
        assert error["param"] == "cache_salt"

    def test_ids_beyond_the_vocabulary(self, http: httpx.Client) -> None:
        for name, value in (("logit_bias", {"4097": 1}), ("stop_token_ids", [4097])):
            message = assert_error(http.post(COMPLETION, json={"prompt": "x", name: value}), 400)["message"]
            assert "4097" in message and "4096" in message


@pytest.fixture(scope="module")
def adding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose tokenizer begins each text with a token of its own, with several names, behind a key that is
    given up early."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{token} $A", special_tokens=[(token, 5)])
    tokenizer.save_pretrained(directory)
    engine = AsyncLLMEngine(tokenizer=str(directory), num_gpu_blocks=64, max_model_len=256)
    with running(engine, served_model_name=["first", "second"], request_timeout=60) as server:
        yield server


def test_several_names(adding: Running) -> None:
    with openai.OpenAI(base_url=f"{adding.url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["first", "second"]
        assert client.models.retrieve("second").id == "second"
        for name in ("first", "second"):
            assert client.completions.create(model=name, prompt="Once", max_tokens=1).model == "first"
        with pytest.raises(openai.NotFoundError, match="'first' or 'second'"):
            client.completions.create(model="tutor", prompt="Once")


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    engine = AsyncLLMEngine(num_gpu_blocks=64, max_model_len=512)
    with running(engine, api_key="secret", request_timeout=0.5) as server:
        yield server


class TestAKeyAndATimeout:
    def test_the_key_in_the_header_that_others_use(self, locked: Running) -> None:
        for key, status in (("secret", 200), ("wrong", 401), ("", 401)):
            assert httpx.get(f"{locked.url}/v1/models", headers={"x-api-key": key}).status_code == status
        both = {"x-api-key": "secret", "authorization": "Bearer wrong"}
        assert httpx.get(f"{locked.url}/v1/models", headers=both).status_code == 401

    def test_probes_need_none(self, locked: Running) -> None:
        assert httpx.get(f"{locked.url}/health/").status_code == 200
        assert httpx.get(f"{locked.url}/v1/models/").status_code == 401

    def test_what_took_too_long_is_not_asked_for_again(self, locked: Running) -> None:
        calls: list[httpx.Request] = []
        with (
            locked.held(),
            httpx.Client(event_hooks={"request": [calls.append]}) as transport,
            openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret", http_client=transport) as client,
            pytest.raises(openai.APIStatusError) as caught,
        ):
            client.completions.create(model="tutor", prompt="Once", max_tokens=400)
        assert caught.value.status_code == 408 and len(calls) == 1
