"""What the engine's methods promise: prompts in every form, results in order, and nothing left behind."""

import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mini_infer import LLM, EngineConfig, GenerateOutput, LLMEngine, SamplingParams
from mini_infer.exceptions import InvalidRequestError
from mini_infer.step import StepInput
from tests.engine.checkpoints import VOCAB_SIZE, make_engine_checkpoint, save_tokenizer
from tests.engine.executors import Failing, interpose

PROMPT = "What is a block?"
OTHERS = ("One", "什么是块？", "a much longer prompt, which takes a few blocks", "Two")
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
USER = {"role": "user", "content": "你好"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def shared_llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float64", block_size=4, num_gpu_blocks=256)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """Whatever a test does, it leaves nothing in the engine."""
    yield shared_llm
    assert_empty(shared_llm)


@pytest.fixture
def chunked(checkpoint: Path) -> Iterator[LLM]:
    """An engine of one's own, whose prompts take several steps and whose requests have to wait for a seat."""
    llm = LLM(checkpoint, dtype="float64", block_size=4, num_gpu_blocks=64, max_num_batched_tokens=8, max_num_seqs=2)
    yield llm
    assert_empty(llm)


@pytest.fixture(scope="module")
def ids(checkpoint: Path) -> Callable[[str], list[int]]:
    return AutoTokenizer.from_pretrained(checkpoint).encode


def assert_empty(llm: LLMEngine) -> None:
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert llm.is_finished()


def tokens(outputs: list[GenerateOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def wait(llm: LLMEngine, request_id: str) -> GenerateOutput:
    """As the documented polling loop does."""
    while (output := llm.get_output(request_id)) is None:
        pass
    return output


@pytest.fixture(scope="module")
def expected(shared_llm: LLM) -> list[int]:
    """The tokens that follow PROMPT, in whatever form it comes."""
    return shared_llm.generate(PROMPT, GREEDY)[0].token_ids


class TestPrompts:
    FORMS: tuple[Callable[[list[int]], Any], ...] = (
        list,
        tuple,
        np.array,
        lambda ids: np.array(ids, dtype=np.uint16),
        lambda ids: list(np.array(ids)),
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: list(torch.tensor(ids)),
    )
    NAMES = ("list", "tuple", "numpy", "numpy uint16", "list of numpy", "tensor", "tensor int32", "list of tensor")

    @pytest.mark.parametrize("form", FORMS, ids=NAMES)
    def test_one_prompt_of_ids(
        self, llm: LLM, ids: Callable[[str], list[int]], expected: list[int], form: Callable[[list[int]], Any]
    ) -> None:
        (output,) = llm.generate(form(ids(PROMPT)), GREEDY)
        assert output.token_ids == expected
        assert (output.prompt, output.prompt_token_ids) == (None, ids(PROMPT))
        assert all(type(token_id) is int for token_id in output.prompt_token_ids)

    @pytest.mark.parametrize("form", FORMS, ids=NAMES)
    def test_a_list_of_them(
        self, llm: LLM, ids: Callable[[str], list[int]], expected: list[int], form: Callable[[list[int]], Any]
    ) -> None:
        other = llm.generate("One", GREEDY)[0].token_ids
        outputs = llm.generate([form(ids("One")), form(ids(PROMPT)), form(ids("One"))], GREEDY)
        assert tokens(outputs) == [other, expected, other]

    @pytest.mark.parametrize("form", FORMS, ids=NAMES)
    def test_streamed_and_queued(
        self, llm: LLM, ids: Callable[[str], list[int]], expected: list[int], form: Callable[[list[int]], Any]
    ) -> None:
        assert "".join(llm.stream(form(ids(PROMPT)), GREEDY)) == llm.generate(PROMPT, GREEDY)[0].text
        assert wait(llm, llm.add_request(form(ids(PROMPT)), GREEDY)).token_ids == expected

    def test_text(self, llm: LLM, ids: Callable[[str], list[int]], expected: list[int]) -> None:
        for prompts in (PROMPT, [PROMPT], (PROMPT,), np.array([PROMPT])):
            (output,) = llm.generate(prompts, GREEDY)
            assert output.token_ids == expected
            assert (output.prompt, output.prompt_token_ids) == (PROMPT, ids(PROMPT))

    def test_two_dimensional_arrays(self, llm: LLM, ids: Callable[[str], list[int]], expected: list[int]) -> None:
        for rows in (np.array([ids(PROMPT)] * 2), torch.tensor([ids(PROMPT)] * 2)):
            assert tokens(llm.generate(rows, GREEDY)) == [expected] * 2

    def test_text_and_ids_mixed(self, llm: LLM, ids: Callable[[str], list[int]], expected: list[int]) -> None:
        outputs = llm.generate([PROMPT, ids(PROMPT), tuple(ids(PROMPT)), torch.tensor(ids(PROMPT))], GREEDY)
        assert tokens(outputs) == [expected] * 4

    def test_the_callers_list_is_left_alone(self, llm: LLM, ids: Callable[[str], list[int]]) -> None:
        prompt = ids(PROMPT)
        (output,) = llm.generate(prompt, GREEDY)
        assert prompt == ids(PROMPT)
        prompt.append(0)
        assert output.prompt_token_ids == ids(PROMPT)

    def test_in_the_prompts_order(self, llm: LLM) -> None:
        """Also when the later ones end first."""
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 5, 7, 1)]
        alone = [llm.generate(prompt, p)[0] for prompt, p in zip(OTHERS, params, strict=True)]
        together = llm.generate(list(OTHERS), params)
        assert [output.prompt for output in together] == list(OTHERS)
        assert tokens(together) == tokens(alone)
        assert len({output.request_id for output in together}) == 4


class TestGenerate:
    def test_n_fills_outputs(self, llm: LLM) -> None:
        params = SamplingParams(n=3, seed=5, max_tokens=8, logprobs=1)
        (output,) = llm.generate(PROMPT, params)
        assert [completion.index for completion in output.outputs] == [0, 1, 2]
        assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
        first = output.outputs[0]
        for name in ("text", "token_ids", "finish_reason", "cumulative_logprob", "logprobs"):
            assert getattr(output, name) == getattr(first, name)
        # The first of three is the one that comes alone.
        assert llm.generate(PROMPT, SamplingParams(seed=5, max_tokens=8))[0].token_ids == first.token_ids

    @pytest.mark.parametrize(
        ("params", "keywords", "length"),
        [
            (None, {}, 100),
            (SamplingParams(ignore_eos=True), {}, 16),
            (SamplingParams(max_tokens=7, ignore_eos=True), {}, 7),
            (SamplingParams(max_tokens=7, ignore_eos=True), {"max_tokens": 9}, 9),
            (None, {"max_tokens": 9}, 9),
            (None, {"max_tokens": None, "temperature": None}, 100),
        ],
    )
    def test_keyword_then_params_then_default(
        self, llm: LLM, params: SamplingParams | None, keywords: dict[str, Any], length: int
    ) -> None:
        (output,) = llm.generate(PROMPT, params, **keywords)
        assert len(output.token_ids) == length or output.finish_reason == "stop"

    @pytest.mark.parametrize("keywords", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}], ids=str)
    def test_each_keyword_goes_before_the_params(self, llm: LLM, keywords: dict[str, Any]) -> None:
        """All of these leave just the likeliest token."""
        params = SamplingParams(temperature=2.0, top_p=0.9, top_k=50, max_tokens=10, ignore_eos=True)
        greedy = llm.generate(PROMPT, GREEDY)[0]
        assert llm.generate(PROMPT, params, **keywords)[0].token_ids == greedy.token_ids
        assert "".join(llm.stream(PROMPT, params, **keywords)) == greedy.text
        chatted = llm.chat([USER], params, **keywords)[0].token_ids
        assert chatted == llm.chat([USER], GREEDY)[0].token_ids

    def test_keywords_change_every_prompts_params(self, llm: LLM) -> None:
        params = [SamplingParams(temperature=t, max_tokens=3, ignore_eos=True) for t in (0.0, 1.0)]
        assert [len(output.token_ids) for output in llm.generate(["One", "Two"], params, max_tokens=5)] == [5, 5]

    def test_params_differ_between_prompts(self, llm: LLM) -> None:
        params = (SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=4, ignore_eos=True))
        assert [len(output.token_ids) for output in llm.generate(["One", "Two"], params)] == [2, 4]

    def test_requests_without_a_seed_differ_and_a_new_engine_repeats_them(self, checkpoint: Path) -> None:
        runs = []
        for seed in (0, 0, 1):
            llm = LLM(checkpoint, dtype="float64", block_size=4, seed=seed)
            runs.append(tokens(llm.generate([PROMPT] * 3, SamplingParams(max_tokens=12, ignore_eos=True))))
        assert len({tuple(each) for each in runs[0]}) == 3
        assert runs[0] == runs[1] != runs[2]

    def test_the_bar_is_for_people(
        self, llm: LLM, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm.generate(["One", "Two"], GREEDY, use_tqdm=False)
        assert capfd.readouterr() == ("", "")
        llm.generate(["One", "Two"], GREEDY)
        assert capfd.readouterr() == ("", "")  # nor into a file
        monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
        llm.generate(["One", "Two"], GREEDY)
        shown = capfd.readouterr()
        assert shown.out == "" and "2/2" in shown.err  # standard output is left to the program

    def test_a_thousand_one_token_requests(self, llm: LLM) -> None:
        outputs = llm.generate([[i % VOCAB_SIZE] for i in range(1000)], temperature=0, max_tokens=1, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == [[i % VOCAB_SIZE] for i in range(1000)]
        assert tokens(outputs)[:VOCAB_SIZE] == tokens(outputs)[VOCAB_SIZE : 2 * VOCAB_SIZE]


class TestOutput:
    @pytest.fixture
    def output(self, llm: LLM) -> GenerateOutput:
        params = SamplingParams(temperature=0, n=2, max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
        return llm.generate(PROMPT, params)[0]

    def test_reads_as_a_mapping(self, output: GenerateOutput) -> None:
        assert output["text"] == output.text and output["token_ids"] == output.token_ids
        assert dict(output)["outputs"] == output.outputs
        assert list(output) == list(output.keys()) and "text" in output
        assert {**output}["finish_reason"] == "length"
        with pytest.raises(KeyError, match="'txt'"):
            output["txt"]

    def test_prints_as_its_text(self, output: GenerateOutput) -> None:
        assert str(output) == f"{output}" == output.text

    def test_is_true_even_when_empty(self, llm: LLM) -> None:
        (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert output.text == "" and output

    def test_to_json_and_back(self, output: GenerateOutput) -> None:
        plain = json.loads(json.dumps(output.to_dict()))
        assert plain["text"] == output.text and plain["prompt"] == PROMPT
        assert plain["outputs"][1]["token_ids"] == output.outputs[1].token_ids
        assert set(plain) == set(output.keys())
        assert plain["metrics"]["num_preemptions"] == 0

    def test_the_cumulative_logprob_is_the_sum(self, output: GenerateOutput) -> None:
        assert output.logprobs is not None
        logprobs = [place[token].logprob for place, token in zip(output.logprobs, output.token_ids, strict=True)]
        assert output.cumulative_logprob == pytest.approx(sum(logprobs))

    def test_metrics_are_in_order(self, chunked: LLM) -> None:
        for output in chunked.generate(list(OTHERS), GREEDY):
            metrics = output.metrics
            assert metrics.first_scheduled_time is not None and metrics.first_token_time is not None
            moments = (
                metrics.arrival_time,
                metrics.first_scheduled_time,
                metrics.first_token_time,
                metrics.finished_time,
            )
            assert list(moments) == sorted(moments)
            assert metrics.time_to_first_token is not None
            assert 0 <= metrics.time_to_first_token <= metrics.latency

    def test_no_token_no_first_token(self, llm: LLM) -> None:
        (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert output.metrics.time_to_first_token is None


class TestChat:
    def test_one_conversation_or_several(self, llm: LLM) -> None:
        system = {"role": "system", "content": "Be brief."}
        first, second = [USER], [system, USER]
        alone = [llm.chat(conversation, GREEDY)[0] for conversation in (first, second)]
        assert tokens(llm.chat([first, second], GREEDY)) == tokens(alone)
        assert alone[0].prompt == "<|start|>user\n你好<|end|>\n<|start|>assistant\n"
        assert alone[0].prompt == llm.render_chat(first)

    def test_it_is_generate_on_the_rendered_prompt(self, llm: LLM) -> None:
        assert tokens(llm.chat([USER], GREEDY)) == tokens(llm.generate(llm.render_chat([USER]), GREEDY))

    def test_special_tokens_of_the_template_are_single_tokens(self, llm: LLM) -> None:
        (output,) = llm.chat([USER], GREEDY)
        assert output.prompt_token_ids.count(257) == 2 and output.prompt_token_ids.count(258) == 1

    @pytest.mark.parametrize("rendered", [True, False], ids=["in the template", "not in the template"])
    def test_one_beginning_of_sequence(self, checkpoint: Path, tmp_path: Path, rendered: bool) -> None:
        """The tokenizer adds the token to every text, but to a chat nothing that its template does not have."""
        tokenizer = save_tokenizer(tmp_path)
        tokenizer.bos_token = "<|start|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
        )
        tokenizer.chat_template = ("{{ bos_token }}" if rendered else "") + "{{ messages[0].content }}"
        tokenizer.save_pretrained(tmp_path)
        llm = LLM(checkpoint, tokenizer=tmp_path, block_size=4)
        bos = tokenizer.bos_token_id
        (chatted,) = llm.chat([{"role": "user", "content": "hi"}], max_tokens=1)
        (plain,) = llm.generate("hi", max_tokens=1)
        assert plain.prompt_token_ids[0] == bos and plain.prompt_token_ids.count(bos) == 1
        assert chatted.prompt_token_ids == plain.prompt_token_ids[not rendered :]
        hf = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True, return_dict=False)
        assert chatted.prompt_token_ids == hf
        # Token ids are taken as they are.
        assert llm.generate([[1, 2]], max_tokens=1)[0].prompt_token_ids == [1, 2]

    def test_template_variables(self, checkpoint: Path, tmp_path: Path) -> None:
        tokenizer = save_tokenizer(tmp_path)
        tokenizer.chat_template = "{{ messages[0].content }}{% if shout %}!{% endif %}"
        tokenizer.save_pretrained(tmp_path)
        llm = LLM(checkpoint, tokenizer=tmp_path, block_size=4)
        assert llm.chat([USER], max_tokens=1, chat_template_kwargs={"shout": True})[0].prompt == "你好!"
        assert llm.render_chat([USER], shout=False) == "你好"

    def test_a_model_without_a_template(self, checkpoint: Path, tmp_path: Path) -> None:
        tokenizer = save_tokenizer(tmp_path)
        tokenizer.chat_template = None
        for file in tmp_path.iterdir():
            file.unlink()
        tokenizer.save_pretrained(tmp_path)
        llm = LLM(checkpoint, tokenizer=tmp_path, block_size=4)
        with pytest.raises(InvalidRequestError, match="template"):
            llm.chat([USER])
        assert llm.generate("hi", max_tokens=1)


class TestStream:
    @pytest.mark.parametrize("seed", range(3))
    def test_pieces_add_up(self, llm: LLM, seed: int) -> None:
        params = SamplingParams(seed=seed, max_tokens=60, ignore_eos=True)
        assert "".join(llm.stream(PROMPT, params)) == llm.generate(PROMPT, params)[0].text

    def test_nothing_runs_before_the_first_piece_is_asked_for(self, llm: LLM) -> None:
        steps = llm.stats().num_steps
        pieces = llm.stream(PROMPT, GREEDY)
        assert llm.stats().num_steps == steps and llm.is_finished()
        assert next(pieces)
        pieces.close()  # type: ignore[attr-defined]

    @pytest.mark.parametrize("how", ["close", "break", "drop", "throw"])
    def test_leaving_early_frees_its_blocks(self, llm: LLM, how: str) -> None:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        pieces: Any = llm.stream(PROMPT, params)
        next(pieces)
        assert llm.stats().num_running == 1 and llm.stats().num_used_blocks > 0
        if how == "close":
            pieces.close()
        elif how == "break":
            for _ in pieces:
                break
            del pieces, _
        elif how == "drop":
            del pieces
        else:
            with pytest.raises(KeyboardInterrupt):
                pieces.throw(KeyboardInterrupt)
        assert_empty(llm)

    def test_two_streams_at_once(self, llm: LLM) -> None:
        """Each step moves both along; what one does not ask for yet waits for it."""
        alone = ["".join(llm.stream(prompt, GREEDY)) for prompt in ("One", "Two")]
        streams = [llm.stream(prompt, GREEDY) for prompt in ("One", "Two")]
        texts = ["", ""]
        for pieces in itertools.zip_longest(*streams, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        assert texts == alone

    def test_a_stream_beside_generate(self, llm: LLM) -> None:
        expected = llm.generate("One", GREEDY)[0].text
        pieces = llm.stream("One", GREEDY)
        first = next(pieces)
        assert llm.generate("Two", GREEDY)[0].finish_reason == "length"
        assert first + "".join(pieces) == expected


class TestOneByOne:
    def test_polling(self, llm: LLM) -> None:
        expected = {prompt: llm.generate(prompt, GREEDY)[0].token_ids for prompt in OTHERS}
        waiting = {llm.add_request(prompt, GREEDY): prompt for prompt in OTHERS}
        assert len(waiting) == len(OTHERS) and all(isinstance(request_id, str) for request_id in waiting)
        while waiting:
            for request_id in list(waiting):
                output = llm.get_output(request_id)
                if output:
                    assert output.request_id == request_id
                    assert output.token_ids == expected[waiting.pop(request_id)]

    def test_an_output_is_handed_over_once(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPT, GREEDY)
        assert wait(llm, request_id).finish_reason == "length"
        with pytest.raises(InvalidRequestError, match=request_id):
            llm.get_output(request_id)

    def test_get_output_runs_one_step_or_none(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPT, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        steps = llm.stats().num_steps
        assert [bool(llm.get_output(request_id)) for _ in range(3)] == [False, False, True]
        assert llm.stats().num_steps == steps + 3
        done = llm.add_request(PROMPT, SamplingParams(temperature=0, max_tokens=1))
        while not llm.is_finished():
            llm.step()
        steps = llm.stats().num_steps
        assert llm.get_output(done) is not None
        assert llm.stats().num_steps == steps

    def test_a_name_of_ones_own(self, llm: LLM) -> None:
        assert llm.add_request(PROMPT, GREEDY, request_id="我的") == "我的"
        assert wait(llm, "我的").request_id == "我的"

    @pytest.mark.parametrize(
        ("arguments", "length"),
        [((), 100), ((SamplingParams(ignore_eos=True),), 16), ((GREEDY, 3), 3), ((None, 3), 3), ((GREEDY, None), 10)],
    )
    def test_precedence(self, llm: LLM, arguments: tuple[Any, ...], length: int) -> None:
        output = wait(llm, llm.add_request(PROMPT, *arguments))
        assert len(output.token_ids) == length or output.finish_reason == "stop"

    def test_steps(self, chunked: LLM) -> None:
        """Two prompts of 6 and 20 tokens under a budget of 8; then decodes."""
        first = chunked.add_request([1] * 6, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        second = chunked.add_request([2] * 20, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        steps = []
        while not chunked.is_finished():
            steps.append(chunked.step())
        assert [num_tokens for _, num_tokens in steps] == [8, 8, 8, 4, -1, -1]
        ended = {request_id: (place, ids) for place, (outputs, _) in enumerate(steps) for request_id, ids in outputs}
        assert ended.keys() == {first, second}
        for request_id, last_step in ((first, 2), (second, 5)):
            place, token_ids = ended[request_id]
            output = chunked.get_output(request_id)
            assert output is not None and output.token_ids == token_ids and place == last_step

    def test_a_step_with_nothing_to_do(self, llm: LLM) -> None:
        steps = llm.stats().num_steps
        assert llm.is_finished()
        assert llm.step() == ([], 0)
        assert llm.stats().num_steps == steps

    def test_step_gives_the_first_completion(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPT, SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True))
        finished: list[tuple[str, list[int]]] = []
        while not finished:
            finished, _ = llm.step()
        output = llm.get_output(request_id)
        assert output is not None and len(output.outputs) == 3
        assert finished == [(request_id, output.outputs[0].token_ids)]

    def test_finished_means_nothing_left_to_compute(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPT, GREEDY)
        assert not llm.is_finished()
        while not llm.is_finished():
            llm.step()
        assert llm.get_output(request_id) is not None  # it was kept


class TestAbort:
    @pytest.mark.parametrize("steps", [0, 1, 2, 3, 6], ids=lambda steps: f"after {steps} steps")
    def test_at_every_stage(self, chunked: LLM, steps: int) -> None:
        """Waiting, within its prompt of 20 tokens under a budget of 8, and while it decodes."""
        kept = chunked.generate([5] * 7, GREEDY)[0].token_ids
        request_id = chunked.add_request([2] * 20, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        for _ in range(steps):
            chunked.step()
        other = chunked.add_request([5] * 7, GREEDY)
        chunked.abort(request_id)
        assert chunked.stats().num_used_blocks == 0  # the other one has not begun
        output = chunked.get_output(request_id)
        assert output is not None and output.finish_reason == "abort"
        assert len(output.token_ids) == max(0, steps - 2)
        assert wait(chunked, other).token_ids == kept

    def test_what_was_generated_is_kept(self, llm: LLM) -> None:
        whole = llm.generate(PROMPT, GREEDY)[0]
        request_id = llm.add_request(PROMPT, GREEDY)
        for _ in range(4):
            llm.step()
        llm.abort(request_id)
        output = llm.get_output(request_id)
        assert output is not None and output.token_ids == whole.token_ids[:4]
        assert whole.text.startswith(output.text)

    def test_after_the_end_it_does_nothing(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPT, GREEDY)
        while not llm.is_finished():
            llm.step()
        llm.abort(request_id)
        output = llm.get_output(request_id)
        assert output is not None and output.finish_reason == "length"
        with pytest.raises(InvalidRequestError, match=request_id):
            llm.abort(request_id)

    def test_twice(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPT, GREEDY)
        llm.step()
        llm.abort(request_id)
        llm.abort(request_id)
        assert llm.get_output(request_id) is not None

    def test_all_of_its_completions(self, chunked: LLM) -> None:
        """Three completions and two seats: two run, one waits."""
        request_id = chunked.add_request([3] * 3, SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True))
        for _ in range(3):
            chunked.step()
        chunked.abort(request_id)
        assert_empty(chunked)
        output = chunked.get_output(request_id)
        assert output is not None and [len(c.token_ids) for c in output.outputs] == [3, 3, 0]

    def test_completions_that_had_ended_keep_their_reason(self, chunked: LLM) -> None:
        request_id = chunked.add_request([3] * 3, SamplingParams(n=3, seed=1, max_tokens=2, ignore_eos=True))
        for _ in range(3):
            chunked.step()
        chunked.abort(request_id)
        output = chunked.get_output(request_id)
        assert output is not None
        assert [completion.finish_reason for completion in output.outputs] == ["length", "length", "abort"]


class TestInterruptions:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit], ids=lambda error: error.__name__)
    @pytest.mark.parametrize("after", [0, 3, 7])
    def test_generate_leaves_nothing_behind(self, checkpoint: Path, error: type[BaseException], after: int) -> None:
        """Neither those that run, nor those that wait, nor the outputs of those that have finished already."""
        llm = LLM(checkpoint, dtype="float64", block_size=4, max_num_seqs=2)
        seen: set[str] = set()

        def error_of(number: int, step: StepInput) -> BaseException | None:
            seen.update(llm._loop.requests)
            return error() if number == after else None

        interpose(llm, lambda executor: Failing(executor, error_of))
        lengths = (2, 12, 5, 12)
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        with pytest.raises(error):
            llm.generate(list(OTHERS), params, use_tqdm=False)
        assert_empty(llm)
        assert llm.step() == ([], 0)
        assert len(seen) == 4
        for request_id in seen:
            with pytest.raises(InvalidRequestError, match="unknown"):
                llm.get_output(request_id)
        assert len(llm.generate(list(OTHERS), params)) == 4

    def test_requests_queued_before_go_on(self, checkpoint: Path) -> None:
        llm = LLM(checkpoint, dtype="float64", block_size=4)
        expected = llm.generate(PROMPT, GREEDY)[0].token_ids
        queued = llm.add_request(PROMPT, GREEDY)
        llm.step()
        interpose(llm, lambda executor: Failing(executor, lambda n, _: KeyboardInterrupt() if n == 0 else None))
        with pytest.raises(KeyboardInterrupt):
            llm.generate("One", GREEDY)
        assert wait(llm, queued).token_ids == expected


class TestThreads:
    def test_generate_in_two_threads(self, llm: LLM) -> None:
        """Both drive the same engine, step by step, and each gets what it would get alone."""
        batches = [OTHERS, (PROMPT, "three", "四")]
        alone = [tokens(llm.generate(list(prompts), GREEDY, use_tqdm=False)) for prompts in batches]
        together = threading.Barrier(2)

        def run(prompts: tuple[str, ...]) -> list[list[list[int]]]:
            together.wait(timeout=60)
            return [tokens(llm.generate(list(prompts), GREEDY, use_tqdm=False)) for _ in range(3)]

        with ThreadPoolExecutor(2) as pool:
            for expected, got in zip(alone, pool.map(run, batches), strict=True):
                assert got == [expected] * 3

    def test_streams_in_several_threads(self, llm: LLM) -> None:
        alone = [llm.generate(prompt, GREEDY)[0].text for prompt in OTHERS]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda prompt: "".join(llm.stream(prompt, GREEDY)), OTHERS)) == alone

    def test_abort_from_another_thread(self, llm: LLM) -> None:
        """`generate` waits in one thread for what is ended from another."""
        pieces: Any = llm.stream("One", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
        next(pieces)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(llm.generate, "Two", GREEDY, False)
            assert len(waiting.result(timeout=60)) == 1
        pieces.close()


class TestConstruction:
    @pytest.mark.parametrize(
        "make",
        [
            lambda path: LLMEngine(EngineConfig(model=path, dtype="float64")),
            lambda path: LLMEngine(config=EngineConfig(path, dtype="float64")),
            lambda path: LLMEngine(model=path, dtype="float64"),
            lambda path: LLMEngine(model=str(path), dtype="float64"),
            lambda path: LLM(path, dtype="float64"),
            lambda path: LLM(str(path), dtype="float64"),
            lambda path: LLM(model=path, dtype="float64", tokenizer=path),
        ],
    )
    def test_the_same_engine(self, llm: LLM, checkpoint: Path, make: Callable[[Path], LLMEngine]) -> None:
        engine = make(checkpoint)
        assert isinstance(engine, LLMEngine)
        assert tokens(engine.generate(PROMPT, GREEDY)) == tokens(llm.generate(PROMPT, GREEDY))

    def test_what_an_engine_says_of_itself(self, llm: LLM) -> None:
        assert (llm.max_model_len, llm.model_config.vocab_size, llm.device.type) == (256, VOCAB_SIZE, "cpu")
        assert llm.config.block_size == 4
        assert llm.stats().num_blocks == 256

    def test_options_without_meaning_here_are_mentioned(
        self, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            LLM(checkpoint, device="cpu", gpu_memory_utilization=0.5)
        assert caplog.text.count("gpu_memory_utilization") == 1

    def test_stats_add_up(self, chunked: LLM) -> None:
        outputs = chunked.generate(list(OTHERS), GREEDY)
        stats = chunked.stats()
        assert stats.num_generated_tokens == sum(len(output.token_ids) for output in outputs)
        # Every token but the last of each request was computed, some twice if they were preempted.
        computed = sum(len(output.prompt_token_ids) + len(output.token_ids) - 1 for output in outputs)
        assert stats.num_computed_tokens == computed and stats.num_preemptions == 0
        assert 0 < stats.peak_used_blocks <= stats.num_blocks
