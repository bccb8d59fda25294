"""The official client, unchanged but for its base URL, gets what the offline engine gives."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mini_infer import LLM, AsyncLLMEngine, SamplingParams

from .running import Running, running, wait_until

PROMPTS = ["What is a KV cache?", "什么是块？", "Once", "A block is"]
QUESTION: Any = [{"role": "user", "content": "What is a KV cache?"}]
TOLERANCE = 1e-3  # of log probabilities in float32, computed in batches of other shapes


def greedy(max_tokens: int | None = 16, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


class TestModels:
    def test_list_and_retrieve(self, client: openai.OpenAI) -> None:
        (model,) = client.models.list().data
        assert model.id == "tutor"
        assert client.models.retrieve("tutor") == model

    def test_unknown(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("gpt-4")
        assert caught.value.code == "model_not_found" and "'gpt-4'" in caught.value.message
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="x")


class TestCompletions:
    def test_as_offline(self, client: openai.OpenAI, offline: LLM) -> None:
        answer = client.completions.create(model="tutor", prompt=PROMPTS[0], max_tokens=24, temperature=0)
        (expected,) = offline.generate(PROMPTS[0], greedy(24))
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.index) == (expected.text, expected.finish_reason, 0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
        assert answer.usage.completion_tokens == len(expected.token_ids)
        assert answer.usage.total_tokens == len(expected.prompt_token_ids) + len(expected.token_ids)
        assert answer.object == "text_completion" and answer.model == "tutor" and answer.id.startswith("cmpl-")

    def test_sixteen_tokens_unless_told(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="tutor", prompt="Once", extra_body={"ignore_eos": True})
        assert answer.usage is not None and answer.usage.completion_tokens == 16

    def test_null_is_as_if_left_out(self, client: openai.OpenAI) -> None:
        body = {"max_tokens": None, "temperature": None, "stop": None, "suffix": None, "unheard_of": None}
        answer = client.completions.create(model="tutor", prompt="Once", extra_body={"ignore_eos": True, **body})
        assert answer.usage is not None and answer.usage.completion_tokens == 16

    @pytest.mark.parametrize("as_ids", [False, True])
    @pytest.mark.parametrize("stream", [False, True])
    def test_several_prompts(self, client: openai.OpenAI, offline: LLM, as_ids: bool, stream: bool) -> None:
        expected = offline.generate(PROMPTS, SamplingParams(n=2, seed=3, max_tokens=8))
        prompt: Any = [offline.tokenize(text) for text in PROMPTS] if as_ids else PROMPTS
        options: Any = {"model": "tutor", "prompt": prompt, "n": 2, "seed": 3, "max_tokens": 8, "temperature": 1}
        texts = [""] * 8
        if stream:
            for chunk in client.completions.create(**options, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
        else:
            answer = client.completions.create(**options)
            assert [choice.index for choice in answer.choices] == list(range(8))
            texts = [choice.text for choice in answer.choices]
        assert texts == [completion.text for output in expected for completion in output.outputs]

    def test_one_prompt_of_token_ids(self, client: openai.OpenAI, offline: LLM) -> None:
        ids = offline.tokenize(PROMPTS[0])
        answer = client.completions.create(model="tutor", prompt=ids, temperature=0)
        assert answer.choices[0].text == offline.generate(PROMPTS[0], greedy())[0].text

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("max_tokens", [0, 1, 5])
    def test_echo_with_logprobs(self, client: openai.OpenAI, offline: LLM, stream: bool, max_tokens: int) -> None:
        """As evaluation harnesses score a text."""
        params = greedy(max_tokens, logprobs=2, prompt_logprobs=2, ignore_eos=True)
        expected = offline.generate(PROMPTS, params)
        options: Any = {"model": "tutor", "prompt": PROMPTS, "max_tokens": max_tokens, "temperature": 0, "logprobs": 2}
        options |= {"echo": True, "extra_body": {"ignore_eos": True}}
        parts: list[list[Any]] = [[] for _ in PROMPTS]
        if stream:
            for chunk in client.completions.create(**options, stream=True):
                for choice in chunk.choices:
                    parts[choice.index].append(choice)
        else:
            parts = [[choice] for choice in client.completions.create(**options).choices]
        for prompt, output, choices in zip(PROMPTS, expected, parts, strict=True):
            assert "".join(choice.text for choice in choices) == prompt + output.text
            assert choices[-1].finish_reason == "length"
            shape = [choice.logprobs for choice in choices]
            tokens = [token for logprobs in shape for token in logprobs.tokens]
            values = [value for logprobs in shape for value in logprobs.token_logprobs]
            offsets = [offset for logprobs in shape for offset in logprobs.text_offset]
            top = [place for logprobs in shape for place in logprobs.top_logprobs]
            assert tokens == [offline.detokenize([i]) for i in output.prompt_token_ids + output.token_ids]
            assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]
            places = [*(output.prompt_logprobs or []), *(output.logprobs or [])]
            assert values[0] is None and top[0] is None
            for token, value, likeliest, place in list(zip(tokens, values, top, places, strict=True))[1:]:
                assert place is not None
                assert value == pytest.approx(next(iter(place.values())).logprob, abs=TOLERANCE)
                assert likeliest[token] == value
                assert 2 <= len(likeliest) <= 3 and max(likeliest.values()) == pytest.approx(
                    max(entry.logprob for entry in place.values()), abs=TOLERANCE
                )

    def test_stop(self, client: openai.OpenAI, offline: LLM) -> None:
        whole = offline.generate(PROMPTS[0], greedy(24))[0].text
        stop = whole[10:13]
        for stream in (False, True):
            chunks = client.completions.create(
                model="tutor", prompt=PROMPTS[0], max_tokens=24, temperature=0, stop=["\0never", stop], stream=stream
            )
            choices = [chunk.choices[0] for chunk in (chunks if stream else [chunks])]  # type: ignore[union-attr]
            assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
            assert choices[-1].finish_reason == "stop"

    def test_logit_bias_decides(self, client: openai.OpenAI, offline: LLM) -> None:
        (token,) = offline.tokenize(" the")
        answer = client.completions.create(
            model="tutor", prompt="Once", max_tokens=4, temperature=0, logit_bias={str(token): 100}
        )
        assert answer.choices[0].text == " the" * 4

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ({"presence_penalty": 1.5}, {}),
            ({"frequency_penalty": 1.5}, {}),
            ({"top_p": 0.7}, {}),
            ({}, {"top_k": 3}),
            ({}, {"min_p": 0.2}),
            ({}, {"repetition_penalty": 1.3}),
            ({}, {"min_tokens": 9, "stop_token_ids": [13, 14]}),
            ({}, {"ignore_eos": True, "skip_special_tokens": False}),
            ({}, {"cache_salt": "mine", "priority": 3}),
        ],
    )
    def test_sampling_options(
        self, client: openai.OpenAI, offline: LLM, ours: dict[str, Any], theirs: dict[str, Any]
    ) -> None:
        answer = client.completions.create(
            model="tutor", prompt="Once", max_tokens=12, temperature=0.9, seed=5, **ours, extra_body=theirs
        )
        options = {name: value for name, value in (ours | theirs).items() if name != "priority"}
        expected = offline.generate("Once", SamplingParams(max_tokens=12, temperature=0.9, seed=5, **options))[0]
        assert answer.choices[0].text == expected.text


class TestChat:
    def test_as_offline(self, client: openai.OpenAI, offline: LLM) -> None:
        answer = client.chat.completions.create(model="tutor", messages=QUESTION)
        (expected,) = offline.chat(QUESTION, greedy(None))
        (choice,) = answer.choices
        assert choice.message.role == "assistant" and choice.message.content == expected.text
        assert choice.finish_reason == "stop" and choice.logprobs is None
        assert answer.usage is not None and answer.usage.completion_tokens == len(expected.token_ids)
        assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
        assert answer._request_id == answer.id

    def test_the_rest_of_the_context(self, client: openai.OpenAI, offline: LLM) -> None:
        messages: Any = [{"role": "user", "content": "one two three four " * 120}]
        answer = client.chat.completions.create(model="tutor", messages=messages, extra_body={"ignore_eos": True})
        assert answer.usage is not None and answer.usage.completion_tokens > 100  # the default of other endpoints
        assert answer.usage.total_tokens == offline.max_model_len
        assert answer.choices[0].finish_reason == "length"

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_both_names_of_the_limit(self, client: openai.OpenAI, name: str) -> None:
        answer = client.chat.completions.create(model="tutor", messages=QUESTION, **{name: 3})
        assert answer.usage is not None and answer.usage.completion_tokens == 3

    def test_stream(self, client: openai.OpenAI, offline: LLM) -> None:
        chunks = list(client.chat.completions.create(model="tutor", messages=QUESTION, stream=True))
        (expected,) = offline.chat(QUESTION, greedy(None))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
        assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        assert len(chunks) > len(expected.token_ids) // 2, "it did not come piece by piece"
        assert all(chunk.usage is None for chunk in chunks)

    @pytest.mark.parametrize("continuous", [False, True])
    def test_usage_in_a_stream(self, client: openai.OpenAI, offline: LLM, continuous: bool) -> None:
        options: Any = {"include_usage": True, "continuous_usage_stats": continuous}
        *chunks, last = client.chat.completions.create(
            model="tutor", messages=QUESTION, stream=True, stream_options=options
        )
        (expected,) = offline.chat(QUESTION, greedy(None))
        assert last.choices == [] and last.usage is not None
        assert last.usage.completion_tokens == len(expected.token_ids)
        counts = [chunk.usage and chunk.usage.completion_tokens for chunk in chunks]
        if continuous:
            assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == len(expected.token_ids)
        else:
            assert counts == [None] * len(chunks)

    @pytest.mark.parametrize("stream", [False, True])
    def test_three_choices(self, client: openai.OpenAI, offline: LLM, stream: bool) -> None:
        options: Any = {
            "model": "tutor",
            "messages": QUESTION,
            "n": 3,
            "seed": 11,
            "temperature": 2,
            "max_tokens": 20,
        }
        (expected,) = offline.chat(QUESTION, SamplingParams(n=3, seed=11, temperature=2, max_tokens=20))
        texts = [""] * 3
        if stream:
            for chunk in client.chat.completions.create(**options, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        else:
            texts = [choice.message.content or "" for choice in client.chat.completions.create(**options).choices]
        assert texts == [completion.text for completion in expected.outputs]
        assert len(set(texts)) > 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_logprobs(self, client: openai.OpenAI, offline: LLM, stream: bool) -> None:
        options: Any = {"model": "tutor", "messages": QUESTION, "logprobs": True, "top_logprobs": 3, "max_tokens": 6}
        (expected,) = offline.chat(QUESTION, greedy(6, logprobs=3))
        if stream:
            chunks = client.chat.completions.create(**options, stream=True)
            content = [
                c for chunk in chunks if chunk.choices[0].logprobs for c in chunk.choices[0].logprobs.content or []
            ]
        else:
            logprobs = client.chat.completions.create(**options).choices[0].logprobs
            assert logprobs is not None
            content = list(logprobs.content or [])
        assert [entry.token for entry in content] == [offline.detokenize([i]) for i in expected.token_ids]
        for entry, place in zip(content, expected.logprobs or [], strict=True):
            chosen, *_ = place.values()
            assert entry.logprob == pytest.approx(chosen.logprob, abs=TOLERANCE)
            assert entry.bytes == list(entry.token.encode())
            assert [top.token for top in entry.top_logprobs] == [top.decoded_token for top in place.values()]
            assert [t.logprob for t in entry.top_logprobs] == sorted(
                (t.logprob for t in entry.top_logprobs), reverse=True
            )

    def test_conversations_as_clients_write_them(self, client: openai.OpenAI, offline: LLM) -> None:
        """Text parts, developer messages, and an answer sent back with all its empty fields."""
        first = client.chat.completions.create(model="tutor", messages=QUESTION, max_tokens=8)
        of_other_servers = {
            "reasoning_content": "hm",
            "cache_control": {"type": "ephemeral"},
            "id": "m1",
            "type": "text",
        }
        messages: Any = [
            {"role": "developer", "content": "Answer briefly."},
            {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "a KV cache?"}]},
            first.choices[0].message.model_dump() | {"annotations": [], "tool_calls": None} | of_other_servers,
            {"role": "user", "content": "And a block?"},
        ]
        answer = client.chat.completions.create(model="tutor", messages=messages, max_tokens=8, user="me", store=False)
        plain = [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "What is\na KV cache?"},
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "And a block?"},
        ]
        assert answer.choices[0].message.content == offline.chat(plain, greedy(8))[0].text

    def test_an_old_form_of_calls_says_what_to_give(self, client: openai.OpenAI) -> None:
        calls: Any = [QUESTION[0], {"role": "assistant", "content": "", "function_call": {"name": "f"}}, QUESTION[0]]
        with pytest.raises(openai.BadRequestError, match="give that instead"):
            client.chat.completions.create(model="tutor", messages=calls)

    def test_top_p_of_zero(self, client: openai.OpenAI, offline: LLM) -> None:
        answer = client.chat.completions.create(model="tutor", messages=QUESTION, top_p=0, max_tokens=8)
        assert answer.choices[0].message.content == offline.chat(QUESTION, greedy(8))[0].text

    def test_what_asks_for_nothing_is_accepted(self, client: openai.OpenAI) -> None:
        client.chat.completions.create(
            model="tutor",
            messages=QUESTION,
            max_tokens=1,
            response_format={"type": "text"},
            tool_choice="none",
            metadata={"a": "b"},
            extra_body={"tools": [], "chat_template_kwargs": {"enable_thinking": False}},
        )

    @pytest.mark.parametrize(
        "option",
        [
            {"functions": [{"name": "f"}]},
            {"reasoning_effort": "high"},
        ],
    )
    def test_what_is_not_supported_yet_says_so(self, client: openai.OpenAI, option: Any) -> None:
        with pytest.raises(openai.BadRequestError, match="not supported") as caught:
            client.chat.completions.create(model="tutor", messages=QUESTION, **option)
        assert caught.value.param == next(iter(option))


class TestLeaving:
    def test_a_cancelled_stream_frees_its_blocks(self, client: openai.OpenAI, server: Running) -> None:
        with client.chat.completions.create(
            model="tutor", messages=QUESTION, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            request_id = next(iter(stream)).id
            assert not server.is_idle()
        wait_until(server.is_idle)
        assert request_id.startswith("chatcmpl-")

    def test_a_timeout_on_the_clients_side(self, server: Running) -> None:
        """The answer is not streamed, so the server has nothing to send when the client leaves."""
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=0.1) as client,
            pytest.raises(openai.APITimeoutError),
        ):
            client.completions.create(
                model="tutor", prompt=["Once"] * 32, max_tokens=900, extra_body={"ignore_eos": True}
            )
        before = server.stats().num_generated_tokens
        wait_until(server.is_idle)
        assert server.stats().num_generated_tokens - before < 32 * 400


class TestAsync:
    def test_many_at_once(self, server: Running, offline: LLM) -> None:
        prompts = [f"{number} {prompt}" for number in range(8) for prompt in PROMPTS]

        async def main() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:

                async def one(prompt: str) -> str:
                    stream = await client.completions.create(
                        model="tutor", prompt=prompt, temperature=0, max_tokens=12, stream=True
                    )
                    return "".join([chunk.choices[0].text async for chunk in stream])

                return await asyncio.gather(*map(one, prompts))

        expected = offline.generate(prompts, greedy(12))
        assert asyncio.run(main()) == [output.text for output in expected]

    def test_a_cancelled_task(self, server: Running) -> None:
        async def main() -> None:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:

                async def endless() -> None:
                    stream = await client.completions.create(
                        model="tutor", prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
                    )
                    async for _ in stream:
                        begun.set()

                begun = asyncio.Event()
                task = asyncio.create_task(endless())
                await begun.wait()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
        wait_until(server.is_idle)


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(AsyncLLMEngine(num_gpu_blocks=64, max_model_len=256), api_key="secret", request_timeout=60) as server:
        yield server


class TestKey:
    def test_wrong(self, locked: Running) -> None:
        with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as client:
            for call in (client.models.list, lambda: client.completions.create(model="tutor", prompt="Once")):
                with pytest.raises(openai.AuthenticationError) as caught:
                    call()
                assert caught.value.code == "invalid_api_key"

    def test_right(self, locked: Running) -> None:
        with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret", max_retries=0) as client:
            assert client.models.list().data[0].id == "tutor"
            assert client.completions.create(model="tutor", prompt="Once", max_tokens=2).choices[0].text
