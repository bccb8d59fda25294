"""When a generation ends, and what is left out of its text."""

import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, StopStringCriteria

from mini_infer import LLM, GenerateOutput, SamplingParams
from mini_infer.exceptions import InvalidCheckpointError, InvalidRequestError
from mini_infer.random import derived_seed
from tests.engine.checkpoints import EOS, VOCAB_SIZE, make_engine_checkpoint

PROMPT = "Once upon a time"
MAX_MODEL_LEN = 256

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float64", block_size=8)


@pytest.fixture
def make_llm(checkpoint: Path, tmp_path: Path) -> MakeLLM:
    """An engine of the same weights beside another ``generation_config.json``, or none."""

    def make(generation_config: dict[str, Any] | str | None, **config: Any) -> LLM:
        directory = tmp_path / "model"
        shutil.copytree(checkpoint, directory)
        path = directory / "generation_config.json"
        path.unlink(missing_ok=True)
        if generation_config is not None:
            text = generation_config if isinstance(generation_config, str) else json.dumps(generation_config)
            path.write_text(text, encoding="utf-8")
        if config:
            known = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            (directory / "config.json").write_text(json.dumps(known | config), encoding="utf-8")
        return LLM(directory, dtype="float64", block_size=8)

    return make


@pytest.fixture(scope="module")
def letters(llm: LLM) -> dict[int, float]:
    """A bias that leaves only small letters to choose from, each a token of its own."""
    return dict.fromkeys(llm.generate("abcdefghijklmnopqrstuvwxyz", max_tokens=1)[0].prompt_token_ids, 100.0)


def sampled(bias: dict[int, float], seed: int = 0, **options: Any) -> SamplingParams:
    """Drawn by seed, so that the text is varied and yet always the same."""
    options = {"temperature": 5.0, "max_tokens": 40, "seed": seed, "logit_bias": bias} | options
    return SamplingParams(**options)


def only(outputs: list[GenerateOutput]) -> GenerateOutput:
    (output,) = outputs
    return output


def run(llm: LLM, params: SamplingParams | None = None, **options: Any) -> GenerateOutput:
    return only(llm.generate(PROMPT, params, use_tqdm=False, **options))


@pytest.fixture(scope="module")
def plain(llm: LLM, letters: dict[int, float]) -> GenerateOutput:
    """What comes when nothing stops it."""
    output = run(llm, sampled(letters))
    assert len(output.text) == 40 and output.text.isalpha()
    return output


class TestStopStrings:
    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    @pytest.mark.parametrize("place", [0, 1, 5, 20, 33])
    def test_the_text_ends_before_the_stop_string(
        self, llm: LLM, letters: dict[int, float], plain: GenerateOutput, place: int, size: int
    ) -> None:
        """Every letter is a token, so that a longer stop string always straddles some."""
        stop = plain.text[place : place + size]
        output = run(llm, sampled(letters, stop=stop))
        position = plain.text.index(stop)
        assert output.text == plain.text[:position]
        assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
        assert output.token_ids == plain.token_ids[: position + size]  # those of the stop string were generated, too

    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    def test_no_part_of_it_is_streamed(
        self, llm: LLM, letters: dict[int, float], plain: GenerateOutput, size: int
    ) -> None:
        stop = plain.text[20 : 20 + size]
        expected = plain.text[: plain.text.index(stop)]
        pieces = list(llm.stream(PROMPT, sampled(letters, stop=[stop, "never"])))
        assert "".join(pieces) == expected
        assert all(expected.startswith(shown) for shown in itertools.accumulate(pieces))

    def test_stop_strings_is_another_spelling(self, llm: LLM, letters: dict[int, float], plain: GenerateOutput) -> None:
        stop = plain.text[10:13]
        output = run(llm, sampled(letters, stop_strings=["0", stop]))
        assert output.text == plain.text[: plain.text.index(stop)]
        assert output.outputs[0].stop_reason == stop

    def test_what_only_looks_like_one_is_kept_until_it_does_not(
        self, llm: LLM, letters: dict[int, float], plain: GenerateOutput
    ) -> None:
        """Each letter could begin a stop string, none does; the last is released by the end of the generation."""
        stops = [letter + "0" for letter in sorted(set(plain.text))]
        pieces = list(llm.stream(PROMPT, sampled(letters, stop=stops)))
        assert "".join(pieces) == plain.text
        output = run(llm, sampled(letters, stop=[*stops, plain.text[-3:] + "0"]))
        assert (output.text, output.finish_reason) == (plain.text, "length")

    def test_a_stop_string_completed_by_the_last_token_goes_before_length(
        self, llm: LLM, letters: dict[int, float], plain: GenerateOutput
    ) -> None:
        stop = plain.text[9:13]
        size = plain.text.index(stop) + len(stop)
        output = run(llm, sampled(letters, stop=stop, max_tokens=size))
        assert (output.text, output.finish_reason) == (plain.text[: size - 4], "stop")
        output = run(llm, sampled(letters, stop=stop, max_tokens=size - 1))
        assert (output.text, output.finish_reason) == (plain.text[: size - 1], "length")

    def test_the_first_of_several_wins(self, llm: LLM, letters: dict[int, float], plain: GenerateOutput) -> None:
        stops = [plain.text[30:34], plain.text[15:19], plain.text[22:26]]
        positions = {plain.text.index(stop): stop for stop in stops}
        output = run(llm, sampled(letters, stop=stops))
        assert output.text == plain.text[: min(positions)]
        assert output.outputs[0].stop_reason == positions[min(positions)]

    def test_it_must_come_after_min_tokens(self, llm: LLM, letters: dict[int, float], plain: GenerateOutput) -> None:
        letter = max(set(plain.text), key=plain.text.count)
        first, second = [place for place, char in enumerate(plain.text) if char == letter][:2]
        output = run(llm, sampled(letters, stop=letter, min_tokens=first + 1))
        assert output.text == plain.text[:second]
        assert run(llm, sampled(letters, stop=letter, min_tokens=first)).text == plain.text[:first]

    def test_the_prompt_is_not_searched(self, llm: LLM, letters: dict[int, float], plain: GenerateOutput) -> None:
        prompt = PROMPT + plain.text[:2]
        text = only(llm.generate(prompt, sampled(letters, temperature=0))).text
        stop = plain.text[:2] + text[0]  # begins in the prompt
        assert stop not in text
        assert only(llm.generate(prompt, sampled(letters, temperature=0, stop=stop))).text == text

    @pytest.mark.parametrize("size", [1, 2])
    def test_one_that_only_the_end_completes(self, llm: LLM, size: int) -> None:
        """Where the last token leaves a character unfinished, the end shows it, and it can be what stops."""
        first = llm.generate("中", max_tokens=1)[0].prompt_token_ids[0]
        params = sampled({first: 100.0}, temperature=0, max_tokens=size)
        assert run(llm, params).text == "\ufffd" * size
        output = run(llm, replace(params, stop="\ufffd" * size))
        assert (output.text, output.finish_reason, output.outputs[0].stop_reason) == ("", "stop", "\ufffd" * size)

    def test_there_are_limits(self) -> None:
        for options, limit in (
            ({"stop": ["a"] * 65}, "64"),
            ({"stop": "a" * 513}, "512"),
            ({"stop_token_ids": [1] * 1025}, "1024"),
        ):
            with pytest.raises(InvalidRequestError, match=limit):
                SamplingParams(**options)
        SamplingParams(stop=["a" * 512] * 64, stop_token_ids=[1] * 1024)

    def test_a_chinese_one(self, llm: LLM) -> None:
        """Only the three bytes of one character to choose from: sometimes they come in the right order."""
        bias = dict.fromkeys(llm.generate("中", max_tokens=1)[0].prompt_token_ids, 100.0)
        plain = run(llm, sampled(bias, max_tokens=200))
        assert "中" in plain.text
        pieces = list(llm.stream(PROMPT, sampled(bias, max_tokens=200, stop="中")))
        assert "".join(pieces) == plain.text[: plain.text.index("中")]

    @pytest.mark.parametrize("seed", range(3))
    def test_each_completion_stops_by_itself(self, llm: LLM, letters: dict[int, float], seed: int) -> None:
        plain = run(llm, sampled(letters, seed, n=4))
        stop = plain.outputs[2].text[5:7]
        output = run(llm, sampled(letters, seed, n=4, stop=stop))
        for before, after in zip(plain.outputs, output.outputs, strict=True):
            assert after.text == before.text.split(stop)[0]
            assert after.finish_reason == ("stop" if stop in before.text else "length")


class TestStopTokens:
    def test_a_stop_token_ends_and_is_no_text(self, llm: LLM, letters: dict[int, float]) -> None:
        plain = run(llm, sampled(letters))
        token = plain.token_ids[12]
        place = plain.token_ids.index(token)
        output = run(llm, sampled(letters, stop_token_ids=[EOS, token]))
        assert output.token_ids == plain.token_ids[: place + 1]
        assert output.text == plain.text[:place]
        assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", token)

    def test_not_before_min_tokens(self, llm: LLM, letters: dict[int, float]) -> None:
        token = run(llm, sampled(letters)).token_ids[0]
        assert len(run(llm, sampled(letters, stop_token_ids=[token])).token_ids) == 1
        output = run(llm, sampled(letters, stop_token_ids=[token], min_tokens=10))
        assert len(output.token_ids) > 10
        assert token not in output.token_ids[:10]

    def test_ignore_eos_leaves_them_alone(self, llm: LLM, letters: dict[int, float]) -> None:
        token = run(llm, sampled(letters)).token_ids[7]
        output = run(llm, sampled(letters, stop_token_ids=[token], ignore_eos=True))
        assert (output.finish_reason, output.token_ids[-1]) == ("stop", token)

    def test_on_the_last_token_it_is_a_stop(self, llm: LLM, letters: dict[int, float]) -> None:
        token = run(llm, sampled(letters)).token_ids[0]
        assert run(llm, sampled(letters, stop_token_ids=[token], max_tokens=1)).finish_reason == "stop"

    def test_text_held_for_a_stop_string_is_released(self, llm: LLM, letters: dict[int, float]) -> None:
        plain = run(llm, sampled(letters))
        token = plain.token_ids[12]
        place = plain.token_ids.index(token)
        stop = plain.text[:place] + "0"
        output = run(llm, sampled(letters, stop_token_ids=[token], stop=stop))
        assert (output.text, output.outputs[0].stop_reason) == (plain.text[:place], token)


class TestEndOfSequence:
    """The model's own: a bias makes it come, and the reason is given as "stop" without more."""

    def test_it_ends_the_text(self, llm: LLM, letters: dict[int, float]) -> None:
        output = run(llm, sampled(letters | {EOS: 100.0}, max_tokens=200))
        assert output.token_ids[-1] == EOS and EOS not in output.token_ids[:-1]
        assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", None)
        assert len(output.text) == len(output.token_ids) - 1

    @pytest.mark.parametrize("skip_special_tokens", [True, False])
    def test_ignore_eos(self, llm: LLM, letters: dict[int, float], skip_special_tokens: bool) -> None:
        bias = letters | {EOS: 100.0}
        output = run(llm, sampled(bias, max_tokens=200, ignore_eos=True, skip_special_tokens=skip_special_tokens))
        assert output.token_ids.count(EOS) > 1
        assert (output.finish_reason, len(output.token_ids)) == ("length", 200)
        assert output.text.count("<|eos|>") == (0 if skip_special_tokens else output.token_ids.count(EOS))

    def test_min_tokens(self, llm: LLM, letters: dict[int, float]) -> None:
        bias = {EOS: 100.0}
        assert run(llm, sampled(bias, temperature=0)).token_ids == [EOS]
        output = run(llm, sampled(bias, temperature=0, min_tokens=5))
        assert len(output.token_ids) == 6 and output.token_ids.index(EOS) == 5

    def test_a_list_in_generation_config(self, llm: LLM, make_llm: MakeLLM, letters: dict[int, float]) -> None:
        plain = run(llm, sampled(letters))
        ends = [EOS, plain.token_ids[4], plain.token_ids[9]]
        place = min(plain.token_ids.index(token) for token in ends[1:])
        listed = make_llm({"eos_token_id": ends})
        output = run(listed, sampled(letters))
        assert output.token_ids == plain.token_ids[: place + 1]
        assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", None)
        assert output.text == plain.text[:place]
        assert run(listed, sampled(letters, ignore_eos=True)).token_ids == plain.token_ids

    @pytest.mark.parametrize("seed", range(3))
    def test_every_place_that_names_one_counts(self, make_llm: MakeLLM, letters: dict[int, float], seed: int) -> None:
        """Each of the files may name none, one or several; the tokenizer names its own."""
        draw = random.Random(seed)
        named = [draw.sample(list(letters), draw.randrange(3)) for _ in range(2)]
        values = [ids[0] if len(ids) == 1 else ids or None for ids in named]
        llm = make_llm({"eos_token_id": values[0]}, eos_token_id=values[1])
        for token_id in [*letters, EOS]:
            ends = token_id in {*named[0], *named[1], EOS}
            output = run(llm, sampled({token_id: 100.0}, temperature=0, max_tokens=2))
            assert output.finish_reason == ("stop" if ends else "length"), (token_id, named)
            assert run(llm, sampled({token_id: 100.0}, temperature=0, ignore_eos=True)).finish_reason == "length"

    def test_an_id_beyond_the_vocabulary_does_no_harm(self, make_llm: MakeLLM, letters: dict[int, float]) -> None:
        """Some checkpoints list ids of tokens that their embedding does not have."""
        llm = make_llm({"eos_token_id": [EOS, VOCAB_SIZE + 5]})
        assert len(run(llm, sampled(letters, min_tokens=5)).token_ids) == 40


class TestLength:
    @pytest.mark.parametrize("max_tokens", [1, 2, 17])
    def test_max_tokens(self, llm: LLM, max_tokens: int) -> None:
        output = run(llm, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
        assert (len(output.token_ids), output.finish_reason) == (max_tokens, "length")
        assert output.outputs[0].stop_reason is None

    @pytest.mark.parametrize("max_tokens", [None, MAX_MODEL_LEN, 10**9])
    @pytest.mark.parametrize("num_prompt_tokens", [1, 200, MAX_MODEL_LEN - 1])
    def test_max_model_len(self, llm: LLM, num_prompt_tokens: int, max_tokens: int | None) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        output = only(llm.generate([[3] * num_prompt_tokens], params))
        assert (len(output.token_ids), output.finish_reason) == (MAX_MODEL_LEN - num_prompt_tokens, "length")

    def test_a_smaller_max_model_len(self, checkpoint: Path) -> None:
        llm = LLM(checkpoint, max_model_len=20, block_size=8)
        output = only(llm.generate([[3] * 15], SamplingParams(max_tokens=None, ignore_eos=True)))
        assert (len(output.token_ids), output.finish_reason) == (5, "length")

    def test_no_tokens_at_all(self, llm: LLM) -> None:
        output = run(llm, SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(PROMPT)


class TestSamplingDefaults:
    def test_do_sample_false_is_greedy(self, make_llm: MakeLLM) -> None:
        llm = make_llm({"do_sample": False, "temperature": 0.6, "top_k": 20, "eos_token_id": EOS})
        assert llm.default_sampling_params.greedy
        greedy = run(llm, SamplingParams(temperature=0, max_tokens=20)).token_ids
        assert [run(llm, max_tokens=20).token_ids for _ in range(3)] == [greedy] * 3

    def test_all_that_the_file_says(self, make_llm: MakeLLM) -> None:
        given = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
        llm = make_llm(given | {"do_sample": True, "max_new_tokens": 7, "eos_token_id": EOS})
        assert llm.default_sampling_params == SamplingParams(max_tokens=100, **given)
        explicit = run(llm, SamplingParams(max_tokens=20, seed=derived_seed(llm.config.seed, 0), **given))
        again = LLM(llm.config.model, dtype="float64", block_size=8)
        assert run(again, max_tokens=20).token_ids == explicit.token_ids  # its first request, so the same seed

    def test_sampling_params_go_before_it(self, llm: LLM, make_llm: MakeLLM) -> None:
        other = make_llm({"do_sample": False, "repetition_penalty": 1.9, "eos_token_id": EOS})
        params = SamplingParams(seed=3, max_tokens=20)
        assert run(other, params).token_ids == run(llm, params).token_ids

    def test_a_keyword_changes_just_that_one(self, make_llm: MakeLLM) -> None:
        llm = make_llm({"do_sample": False, "repetition_penalty": 1.9, "eos_token_id": EOS})
        expected = run(llm, SamplingParams(temperature=0, repetition_penalty=1.9, max_tokens=9)).token_ids
        assert run(llm, max_tokens=9).token_ids == expected
        assert run(llm, max_tokens=9, temperature=0.0).token_ids == expected

    @pytest.mark.parametrize("value", [0, 0.0])
    def test_top_p_of_zero_is_the_likeliest_token(self, make_llm: MakeLLM, value: float) -> None:
        llm = make_llm({"top_p": value, "temperature": 1.5, "top_k": 50.0})
        assert (llm.default_sampling_params.top_k, llm.default_sampling_params.top_p) == (50, 0)
        for options in ({"top_k": -1}, {"top_k": 20}, {}):  # each is another way through the sampler
            expected = run(llm, SamplingParams(temperature=0, max_tokens=12)).token_ids
            assert run(llm, SamplingParams(top_p=value, max_tokens=12, **options)).token_ids == expected
        assert run(llm, max_tokens=12).token_ids == expected

    def test_nothing_said(self, make_llm: MakeLLM) -> None:
        assert make_llm({"temperature": None, "top_p": None}).default_sampling_params == SamplingParams(max_tokens=100)

    @pytest.mark.parametrize(
        ("content", "shown"),
        [
            ({"temperature": -1}, "-1"),
            ({"top_p": 2.5}, "2.5"),
            ({"eos_token_id": "</s>"}, "'</s>'"),
            ({"eos_token_id": [1, "x"]}, "'x'"),
            ("{not json", "not valid JSON"),
            ("[1, 2]", "list"),
        ],
        ids=str,
    )
    def test_a_malformed_file_is_named(self, make_llm: MakeLLM, content: dict[str, Any] | str, shown: str) -> None:
        with pytest.raises(InvalidCheckpointError) as caught:
            make_llm(content)
        assert shown in str(caught.value)


class TestSpecialTokens:
    @pytest.mark.parametrize("seed", range(3))
    def test_skipped_or_shown(self, llm: LLM, letters: dict[int, float], seed: int) -> None:
        bias = letters | {EOS + 1: 100.0, EOS + 2: 100.0}  # <|start|> and <|end|>
        skipped = run(llm, sampled(bias, seed, max_tokens=120))
        shown = run(llm, sampled(bias, seed, max_tokens=120, skip_special_tokens=False))
        assert skipped.token_ids == shown.token_ids
        assert "<|start|>" in shown.text and "<|end|>" in shown.text
        assert skipped.text == shown.text.replace("<|start|>", "").replace("<|end|>", "")

    @pytest.mark.parametrize("skip_special_tokens", [True, False], ids=["skipped", "shown"])
    def test_stop_strings_that_hold_one(
        self, llm: LLM, checkpoint: Path, letters: dict[int, float], skip_special_tokens: bool
    ) -> None:
        """They stop where transformers' ``stop_strings`` stop. Where special tokens are left out of the text, they also
        stop if they are in it, or in the text with some special tokens."""
        seed = random.randrange(10**9)
        print("seed", seed)
        draw = random.Random(seed)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        few = dict.fromkeys([*list(letters)[:3], EOS + 1, EOS + 2], 100.0)
        options = {"max_tokens": 60, "skip_special_tokens": skip_special_tokens}
        plain = run(llm, sampled(few, seed, **options))
        for _ in range(25):
            start = draw.randrange(58)
            stops = [tokenizer.decode(plain.token_ids[start : start + draw.randrange(1, 5)]) for start in (start, 3)]
            stops = [stop[draw.randrange(2) : len(stop) - draw.randrange(2)] or stop for stop in stops]
            criterion = StopStringCriteria(tokenizer, stops)

            def stops_at(token_ids: list[int], criterion: Any = criterion) -> bool:
                """Only the last tokens can matter."""
                views = [[]] if skip_special_tokens else [token_ids]
                for token_id in token_ids[-8:] if skip_special_tokens else []:
                    views = [[*view, token_id] for view in views] + (views if token_id > EOS else [])
                return any(criterion(torch.tensor([view]), None).all() for view in views if view)

            size = next(n for n in range(1, 62) if n > 60 or stops_at(plain.token_ids[:n]))
            output = run(llm, sampled(few, seed, stop=stops, **options))
            assert output.token_ids == plain.token_ids[:size], stops
            assert output.finish_reason == ("length" if size > 60 else "stop")
            assert plain.text.startswith(output.text) and not any(stop in output.text for stop in stops)
            if not skip_special_tokens:
                shown = tokenizer.decode(plain.token_ids[:size])
                cut = min((shown.index(stop) for stop in stops if stop in shown), default=len(shown))
                assert output.text == shown[:cut]

    def test_a_mixed_one(self, llm: LLM) -> None:
        """Whoever looks at the text may not know of the special token in its middle."""
        prompt = llm.tokenize("<|end|>\n<|start|>user")
        assert len(prompt) == 7
        stream = llm.make_request("x", SamplingParams(stop=["<|end|>\nuser"])).completions[0].stream
        for token_id in [*llm.tokenize("Hi"), *prompt]:
            assert stream.stop_string is None
            stream.append(token_id)
        assert stream.stop_string == "<|end|>\nuser" and stream.end() == ""
