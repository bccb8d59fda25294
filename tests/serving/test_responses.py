"""``/v1/responses`` through the official client: it gives what chats give, and remembers it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from mini_infer import LLM, AsyncLLMEngine, SamplingParams
from mini_infer.serving import responses

from .running import Running, running, wait_until
from .test_http import assert_error
from .thinking import save_tokenizer, saying

QUESTION = "What is a KV cache?"
PATH = "/v1/responses"


def as_chat(offline: LLM, messages: list[Any], max_tokens: int = 16) -> Any:
    return offline.chat(messages, SamplingParams(temperature=0, max_tokens=max_tokens))[0]


class TestWhole:
    def test_as_offline(self, client: openai.OpenAI, offline: LLM) -> None:
        response = client.responses.create(model="tutor", input=QUESTION, max_output_tokens=200)
        expected = as_chat(offline, [{"role": "user", "content": QUESTION}], 200)
        assert expected.finish_reason == "stop" and response.status == "completed"
        assert response.output_text == expected.text
        assert response.id.startswith("resp_") and response._request_id == response.id
        assert response.usage is not None
        assert response.usage.input_tokens == len(expected.prompt_token_ids)
        assert response.usage.output_tokens == len(expected.token_ids)
        (item,) = response.output
        assert item.type == "message" and item.status == "completed" and item.role == "assistant"
        assert response.error is None and response.incomplete_details is None and response.model == "tutor"

    def test_cut(self, client: openai.OpenAI) -> None:
        response = client.responses.create(model="tutor", input=QUESTION, max_output_tokens=2)
        assert response.status == "incomplete" and response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        (item,) = response.output
        assert item.type == "message" and item.status == "incomplete"

    def test_items_and_instructions(self, client: openai.OpenAI, offline: LLM) -> None:
        items: Any = [
            {"role": "user", "content": "Hello"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}],
            },
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "input_text", "text": "What is"}, {"type": "text", "text": "it?"}]},
        ]
        response = client.responses.create(model="tutor", input=items, instructions="Be kind.", max_output_tokens=16)
        messages = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is\nit?"},
        ]
        assert response.output_text == as_chat(offline, messages).text
        assert response.instructions == "Be kind."

    def test_sampling(self, client: openai.OpenAI, offline: LLM) -> None:
        response = client.responses.create(
            model="tutor",
            input=QUESTION,
            temperature=0.9,
            top_p=0.8,
            max_output_tokens=12,
            metadata={"a": "b"},
            extra_body={"seed": 5, "top_k": 20, "stop": ["\0never"]},
        )
        params = SamplingParams(temperature=0.9, top_p=0.8, top_k=20, seed=5, max_tokens=12)
        assert response.output_text == offline.chat([{"role": "user", "content": QUESTION}], params)[0].text
        assert (response.temperature, response.top_p, response.metadata) == (0.9, 0.8, {"a": "b"})

    @pytest.mark.parametrize("stream", [False, True])
    def test_logprobs(self, client: openai.OpenAI, offline: LLM, stream: bool) -> None:
        options: Any = {"model": "tutor", "input": QUESTION, "max_output_tokens": 6, "top_logprobs": 2}
        options["include"] = ["message.output_text.logprobs"]
        (expected,) = offline.chat(
            [{"role": "user", "content": QUESTION}], SamplingParams(temperature=0, max_tokens=6, logprobs=2)
        )
        if stream:
            events = client.responses.create(**options, stream=True)
            entries = [e for event in events if event.type == "response.output_text.delta" for e in event.logprobs]
        else:
            (item,) = client.responses.create(**options).output
            entries = item.content[0].logprobs  # type: ignore[union-attr, assignment]
        assert [entry.token for entry in entries] == [offline.detokenize([i]) for i in expected.token_ids]
        assert all(len(entry.top_logprobs or []) == 2 for entry in entries)


class TestStream:
    def test_events(self, client: openai.OpenAI, offline: LLM) -> None:
        events = list(client.responses.create(model="tutor", input=QUESTION, max_output_tokens=12, stream=True))
        expected = as_chat(offline, [{"role": "user", "content": QUESTION}], 12)
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        assert set(kinds[4:-4]) == {"response.output_text.delta"}
        assert [event.sequence_number for event in events] == list(range(len(events)))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == expected.text == events[-1].response.output_text  # type: ignore[union-attr]

    def test_the_helper(self, client: openai.OpenAI, offline: LLM) -> None:
        with client.responses.stream(model="tutor", input=QUESTION, max_output_tokens=200) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    snapshot = event.snapshot
            final = stream.get_final_response()
        expected = as_chat(offline, [{"role": "user", "content": QUESTION}], 200).text
        assert final.output_text == snapshot == expected
        assert client.responses.retrieve(final.id).output_text == expected

    def test_on_the_wire(self, http: httpx.Client) -> None:
        body = {"input": QUESTION, "max_output_tokens": 2, "stream": True}
        answer = http.post(PATH, json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        for block in answer.text.rstrip("\n").split("\n\n"):
            name, data = block.split("\n")
            assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]

    def test_leaving_ends_it(self, client: openai.OpenAI, server: Running) -> None:
        stream = client.responses.create(model="tutor", input=QUESTION, stream=True, extra_body={"ignore_eos": True})
        response_id = next(iter(stream)).response.id  # type: ignore[union-attr]
        stream.close()
        wait_until(server.is_idle)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response_id)


class TestKept:
    def test_going_on(self, client: openai.OpenAI, offline: LLM) -> None:
        """Through whole answers and streams; instructions are those of one request."""
        first = client.responses.create(model="tutor", input=QUESTION, instructions="Be kind.", max_output_tokens=8)
        *_, last = client.responses.create(
            model="tutor", input="And a block?", previous_response_id=first.id, max_output_tokens=8, stream=True
        )
        second = last.response  # type: ignore[union-attr]
        third = client.responses.create(
            model="tutor", input="Why?", previous_response_id=second.id, instructions="Be brief.", max_output_tokens=8
        )
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And a block?"},
            {"role": "assistant", "content": second.output_text},
            {"role": "user", "content": "Why?"},
        ]
        expected = as_chat(offline, messages, 8)
        assert third.output_text == expected.text and third.previous_response_id == second.id
        assert third.usage is not None and third.usage.input_tokens == len(expected.prompt_token_ids)
        assert third.usage.input_tokens_details.cached_tokens % 16 == 0

    def test_fetch_and_forget(self, client: openai.OpenAI) -> None:
        response = client.responses.create(model="tutor", input=QUESTION, max_output_tokens=2)
        assert client.responses.retrieve(response.id) == response
        client.responses.delete(response.id)
        for call in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                call(response.id)
            assert caught.value.code == "response_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="tutor", input="x", previous_response_id=response.id)
        assert refused.value.code == "previous_response_not_found"
        assert refused.value.param == "previous_response_id"

    def test_input_items(self, client: openai.OpenAI) -> None:
        """What a response answers, through all before it; page by page, from either end."""
        call = {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'}
        given: list[Any] = [
            {"role": "user", "content": QUESTION},
            call,
            {"type": "function_call_output", "call_id": "call_1", "output": "2"},
        ]
        first = client.responses.create(model="tutor", input=given, max_output_tokens=4)
        second = client.responses.create(
            model="tutor", input="Why?", previous_response_id=first.id, max_output_tokens=4
        )
        items = list(client.responses.input_items.list(second.id, order="asc", limit=2))
        assert [item.type for item in items] == [
            "message", "function_call", "function_call_output", "message", "message"
        ]  # fmt: skip
        question, called, result, answer, last = (item.model_dump() for item in items)
        assert question["content"][0]["text"] == QUESTION and last["content"][0]["text"] == "Why?"
        assert called | call == called and (result["call_id"], result["output"]) == ("call_1", "2")
        assert answer["content"][0]["text"] == first.output_text
        backwards = list(client.responses.input_items.list(second.id, limit=3))
        assert [item.id for item in backwards] == [item.id for item in items][::-1]
        with pytest.raises(openai.NotFoundError):
            client.responses.input_items.list("resp_none")
        with pytest.raises(openai.BadRequestError, match="no input item"):
            client.responses.input_items.list(second.id, after="msg_99")

    def test_store_false(self, client: openai.OpenAI) -> None:
        response = client.responses.create(model="tutor", input=QUESTION, max_output_tokens=2, store=False)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)

    def test_ids_cannot_be_guessed(self, client: openai.OpenAI) -> None:
        ids = {client.responses.create(model="tutor", input="x", max_output_tokens=1).id for _ in range(3)}
        assert len(ids) == 3 and all(len(response_id) == len("resp_") + 48 for response_id in ids)

    def test_a_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(responses, "KEPT_CHARACTERS", 800)
        engine = AsyncLLMEngine(num_gpu_blocks=64, max_model_len=512)
        with running(engine) as server, httpx.Client(base_url=server.url, timeout=60) as http:
            body: dict[str, Any] = {"input": "word " * 60, "max_output_tokens": 1}
            ids = [http.post(PATH, json=body).json()["id"] for _ in range(3)]
            found = [http.get(f"{PATH}/{response_id}").status_code for response_id in ids]
            assert found == [404, 200, 200], "what was kept first goes first"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = save_tokenizer(tmp_path_factory.mktemp("thinker"))
    with running(AsyncLLMEngine(tokenizer=str(directory), num_gpu_blocks=128, max_model_len=512)) as server:
        yield server


class TestReasoning:
    @pytest.mark.parametrize("stream", [False, True])
    def test_an_item_of_its_own(self, thinker: Running, stream: bool) -> None:
        with (
            openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="any", max_retries=0) as client,
            saying(thinker.engine.engine, "<think>\nHm, keys.\n</think>\n\nA cache."),
        ):
            options: Any = {"model": "tutor", "input": QUESTION, "reasoning": {"effort": "high"}}
            if stream:
                with client.responses.stream(**options) as events:
                    pieces = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
                    response: Any = events.get_final_response()
                assert "".join(pieces) == "Hm, keys."
            else:
                response = client.responses.create(**options)
        thought, message = response.output
        assert thought.type == "reasoning" and thought.content[0].text == "Hm, keys."
        assert message.type == "message" and response.output_text == "A cache."
        assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens

    def test_cut_while_thinking(self, thinker: Running) -> None:
        with saying(thinker.engine.engine, "<think>\nOn and on and on and on."):
            answer = httpx.post(f"{thinker.url}{PATH}", json={"input": QUESTION, "max_output_tokens": 8}).json()
        (item,) = answer["output"]
        assert (item["type"], item["status"], answer["status"]) == ("reasoning", "incomplete", "incomplete")


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"input": 5}, "input must be a text, or a list of input items"),
            ({"input": []}, "input"),
            ({"input": ["x"]}, "input must be"),
            ({"input": [{"role": "user"}]}, "input[0]: content"),
            ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
            ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
            ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
            ({"input": [{"role": "user", "content": "x"}] * 3000}, "input"),
            ({"max_output_tokens": 0}, "max_tokens"),
            ({"n": 2}, "n"),
            ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
            ({"truncation": "auto"}, "truncation"),
            ({"background": True}, "background"),
            ({"include": ["file_search_call.results"]}, "include"),
            ({"conversation": "conv_1"}, "conversation"),
            ({"reasoning": {"effort": "high"}}, "reasoning_effort"),
            ({"top_logprobs": 21}, "top_logprobs"),
            ({"metadata": {"a": "x" * 513}}, "metadata.a"),
            ({"metadata": dict.fromkeys(map(str, range(17)), "x")}, "metadata"),
            ({"unheard_of": 1}, "unheard_of"),
            ({"input": "one two three four " * 2000}, "context_length_exceeded"),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_by_name(self, http: httpx.Client, fields: dict[str, Any], named: str) -> None:
        error = assert_error(http.post(PATH, json={"input": QUESTION} | fields), 400)
        assert named in error["message"] or error["param"] == named, error

    def test_what_asks_for_nothing(self, http: httpx.Client) -> None:
        fields = {
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "reasoning": {"effort": "none", "summary": "auto"},
            "truncation": "disabled",
            "background": False,
            "include": [],
            "user": "me",
            "max_output_tokens": 1,
        }
        assert http.post(PATH, json={"input": QUESTION} | fields).status_code == 200


WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}


class TestTools:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
    def test_a_call(self, client: openai.OpenAI, stream: bool, choice: Any) -> None:
        options: Any = {"model": "tutor", "input": "How is the weather?", "tools": [WEATHER], "tool_choice": choice}
        options |= {"max_output_tokens": 200, "parallel_tool_calls": False}
        if stream:
            with client.responses.stream(**options) as events:
                pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
                response: Any = events.get_final_response()
        else:
            response = client.responses.create(**options)
        (call,) = response.output
        assert (call.type, call.name, call.status, response.status) == (
            "function_call",
            "get_weather",
            "completed",
            "completed",
        )
        arguments = json.loads(call.arguments)
        assert arguments.keys() == {"city", "days"} and isinstance(arguments["days"], int)
        if stream:
            assert "".join(pieces) == call.arguments
        assert response.tools[0].name == "get_weather"

    def test_the_loop(self, client: openai.OpenAI) -> None:
        """By what is kept and by items sent back, the prompt of the next turn is the same."""
        options: Any = {"model": "tutor", "tools": [WEATHER], "max_output_tokens": 200}
        options["parallel_tool_calls"] = False
        first = client.responses.create(input="How is the weather?", tool_choice="required", **options)
        call: Any = first.output[0]
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
        options["tool_choice"] = "none"
        second = client.responses.create(input=[result], previous_response_id=first.id, **options)
        question: Any = {"role": "user", "content": "How is the weather?"}
        again = client.responses.create(input=[question, *first.output, result], **options)  # type: ignore[list-item]
        assert second.output_text == again.output_text
        assert second.usage is not None and again.usage is not None
        assert second.usage.input_tokens == again.usage.input_tokens

    def test_structured(self, client: openai.OpenAI) -> None:
        schema = WEATHER["parameters"]
        form: Any = {"format": {"type": "json_schema", "name": "weather", "schema": schema, "strict": True}}
        response = client.responses.create(model="tutor", input="Hm", text=form, max_output_tokens=200)
        assert json.loads(response.output_text).keys() == {"city", "days"}
        assert response.text is not None and response.text.format is not None
        assert response.text.format.type == "json_schema" and response.text.format.schema_ == schema
