"""Structured outputs: every text keeps to its grammar, and tokens that are forced cost no step of their own.

Ground truth: the language itself, listed by brute force; transformers' log probabilities; the same engine without
drafts.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from mini_infer import LLMEngine, SamplingParams, StructuredOutputsParams
from mini_infer.exceptions import DeadEndError, InvalidRequestError
from mini_infer.outputs import GenerateOutput
from tests.models.test_decoder import reference_model

from .checkpoints import EOS, VOCAB_SIZE, make_engine_checkpoint
from .test_logprobs import assert_token_logprobs

TOLERANCE = 1e-8

_TOKENS = {name: token_id for token_id, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "town": {"enum": ["Oslo", "Rome"]},
        "degrees": {"type": "integer", "minimum": -50, "maximum": 50},
        "scale": {"const": "celsius"},
    },
    "required": ["town", "degrees", "scale"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each byte, an end token, and three ids more that stand for nothing."""
    return make_engine_checkpoint(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return reference_model(checkpoint, torch.float64)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[LLMEngine]:
    with make_engine(checkpoint) as engine:
        yield engine


def make_engine(checkpoint: Path, **fields: Any) -> LLMEngine:
    return LLMEngine(model=checkpoint, dtype="float64", device="cpu", **{"num_gpu_blocks": 200, **fields})


def params(max_tokens: int = 200, temperature: float = 0.0, seed: int = 0, **grammar: Any) -> SamplingParams:
    names = ("json", "regex", "choice", "grammar", "json_object")
    structured = StructuredOutputsParams(**{name: grammar.pop(name) for name in names if name in grammar})
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, structured_outputs=structured, **grammar
    )


def generate(engine: LLMEngine, prompt: Any, *params: SamplingParams) -> list[GenerateOutput]:
    return engine.generate([prompt] * len(params), list(params), use_tqdm=False)


def ids(text: str) -> list[int]:
    """The tokens of an ASCII text: one for each character."""
    return [_TOKENS["Ġ" if character == " " else character] for character in text]


def language(pattern: str, alphabet: str, longest: int) -> set[str]:
    """All texts over an alphabet that a pattern matches; it must match none that is longer."""
    lengths = range(longest + 1)
    texts = ("".join(text) for length in lengths for text in itertools.product(alphabet, repeat=length))
    return {text for text in texts if re.fullmatch(pattern, text)}


def greedy_by_brute_force(model: PreTrainedModel, prompt: list[int], texts: set[str]) -> list[int]:
    """At each place the likeliest of the characters that some text of the language goes on with, or the end."""
    generated = ""
    while True:
        ways_on = {text[len(generated)] for text in texts if text.startswith(generated) and text != generated}
        allowed = {ids(character)[0]: character for character in ways_on} | ({EOS: ""} if generated in texts else {})
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids(generated)])).logits[0, -1]
        best = max(allowed, key=lambda token_id: logits[token_id].item())
        if best == EOS:
            return [*ids(generated), EOS]
        generated += allowed[best]


PATTERNS = (
    "a|b",
    "(ab|cd)?e{0,2}",
    "a{0,3}b{1,2}",
    "[abc]{2}(d|ea)?",
    "(a|ab)(c|bcd)",
    "abcde|abdce",
    "(a(b|c)){1,2}e?",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_is_brute_force(engine: LLMEngine, model: PreTrainedModel, pattern: str) -> None:
    texts = language(pattern, "abcde", 5)
    for seed in range(4):
        prompt = [random.Random(f"{pattern}{seed}").randrange(256) for _ in range(5)]
        for limits in ({"regex": pattern}, {"choice": sorted(texts - {""})}):
            if "" in texts and "choice" in limits:
                continue  # a choice is never empty
            (output,) = generate(engine, prompt, params(**limits))
            assert output.token_ids == greedy_by_brute_force(model, prompt, texts)
            assert (output.text in texts, output.finish_reason) == (True, "stop")


class TestForcedTokens:
    """They are drafts that are always right."""

    def test_change_nothing_but_the_number_of_steps(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a request that shares its prompt with others, penalties, seeds, and too few blocks for all."""
        asked = [
            params(json=SCHEMA, temperature=1.0, seed=1, n=3),
            params(json=SCHEMA, temperature=2.0, seed=2, repetition_penalty=1.3, frequency_penalty=0.5),
            params(regex=r"(key: [0-9]{2}; ){3}end", temperature=1.0, seed=3),
            params(choice=["a very long answer indeed", "another"], seed=4),
            SamplingParams(max_tokens=60, temperature=1.0, seed=5, ignore_eos=True),
        ]
        runs = []
        for may_propose in (True, False):
            with make_engine(checkpoint, num_gpu_blocks=16, block_size=8, max_model_len=112) as engine:
                if not may_propose:
                    monkeypatch.setattr(type(engine._loop.scheduler), "propose", lambda *_: None)
                outputs = generate(engine, "Once upon a time", *asked)
                stats = engine.stats()
                assert stats.num_recompute_preemptions > 0 and stats.num_used_blocks == 0
                runs.append((outputs, stats.num_steps))
        (with_drafts, fewer), (without, more) = runs
        assert fewer < more
        for one, other in zip(with_drafts, without, strict=True):
            for mine, theirs in zip(one.outputs, other.outputs, strict=True):
                assert (mine.token_ids, mine.finish_reason) == (theirs.token_ids, theirs.finish_reason)
                assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=TOLERANCE)

    def test_take_one_step_together(self, engine: LLMEngine) -> None:
        text = "there is but one way to say it"
        (output,) = generate(engine, [1, 2, 3], params(regex=text))
        assert output.text == text and output.token_ids == [*ids(text), EOS]
        assert engine.stats().num_steps == 2  # the prompt and the first token; all others, and the end

    def test_max_tokens_cuts_them(self, engine: LLMEngine) -> None:
        for most in range(1, 8):
            (output,) = generate(engine, [1, 2, 3], params(most, regex="abcdef"))
            assert (output.text, len(output.token_ids)) == ("abcdef"[:most], most)
            assert output.finish_reason == ("stop" if most == 7 else "length")

    def test_a_stop_string_ends_among_them(self, engine: LLMEngine) -> None:
        (output,) = generate(engine, [1, 2, 3], params(regex="abcdef", stop=["d"]))
        assert (output.text, output.finish_reason, output.outputs[0].stop_reason) == ("abc", "stop", "d")
        assert output.token_ids == ids("abcd") and engine.stats().num_used_blocks == 0

    def test_a_stop_token_ends_among_them(self, engine: LLMEngine) -> None:
        (output,) = generate(engine, [1, 2, 3], params(regex="abcdef", stop_token_ids=[ids("d")[0]]))
        assert (output.text, output.token_ids, output.outputs[0].stop_reason) == ("abc", ids("abcd"), ids("d")[0])

    def test_log_probabilities_are_the_models(self, engine: LLMEngine, model: PreTrainedModel) -> None:
        asked = [
            params(json=SCHEMA, temperature=1.0, n=2, logprobs=3),
            params(regex="forced, all of it", logprobs=2),
            params(regex="forced, all of it"),
        ]
        for output, one in zip(generate(engine, "Once", *asked), asked, strict=True):
            assert_token_logprobs(engine, model, output, one, TOLERANCE)

    def test_are_told_as_one_increment(self, engine: LLMEngine) -> None:
        told: list[Any] = []
        request = engine.make_request([1, 2, 3], params(regex="abcdef", logprobs=1), listener=told.append)
        engine.submit(request)
        while not request.finished:
            engine.step()
        assert [increment.text for increment in told] == ["a", "bcdef"]
        assert [len(increment.token_ids) for increment in told] == [1, 6]
        assert [len(increment.logprobs) for increment in told] == [1, 6]


class TestTheEnd:
    def test_only_where_the_text_is_complete(self, engine: LLMEngine) -> None:
        """An end token that the model loves comes no sooner than it may."""
        bias = {EOS: 100.0}
        (output,) = generate(engine, [1, 2, 3], params(regex="[ab]{3,9}", logit_bias=bias))
        assert len(output.text) == 3 and output.token_ids[-1] == EOS

    @pytest.mark.parametrize("token_id", [*range(EOS + 1, VOCAB_SIZE), EOS, ids("c")[0]])
    def test_nothing_else_is_ever_drawn(self, engine: LLMEngine, token_id: int) -> None:
        """Neither special tokens, nor ids beyond the tokenizer's."""
        (output,) = generate(engine, [1, 2, 3], params(20, regex="[ab]*z", logit_bias={token_id: 100.0}))
        assert set(output.text) <= set("abz") and set(output.token_ids) <= {*ids("abz"), EOS}

    def test_ignore_eos(self, engine: LLMEngine) -> None:
        endless, finite = generate(
            engine, [1, 2], params(30, regex="a*", ignore_eos=True), params(30, regex="a{3}", ignore_eos=True)
        )
        assert (endless.text, endless.finish_reason) == ("a" * 30, "length")
        assert (finite.text, finite.finish_reason, finite.token_ids) == ("aaa", "stop", ids("aaa"))

    def test_min_tokens(self, engine: LLMEngine) -> None:
        bias = {EOS: 100.0}
        longer, complete = generate(
            engine,
            [1, 2],
            params(30, regex="a*", min_tokens=7, logit_bias=bias),
            params(30, regex="a{3}", min_tokens=7, logit_bias=bias),
        )
        assert (longer.text, longer.finish_reason) == ("a" * 7, "stop")
        assert (complete.text, complete.finish_reason) == ("aaa", "stop")  # nothing may follow

    def test_stop_tokens_of_ones_own(self, engine: LLMEngine) -> None:
        """As text they may come where the grammar has them, and as an end where the text is complete."""
        (output,) = generate(engine, [1, 2], params(30, regex="[ab]{3}", stop_token_ids=[ids("!")[0]], ignore_eos=True))
        assert (output.text[:3], output.token_ids[3:]) == (output.text, [ids("!")[0]])

    def test_a_dead_end_ends_its_own_completions_alone(self, engine: LLMEngine) -> None:
        """Every way on is a stop token, which must not come yet."""
        stuck = params(30, regex="[ab]{5}", stop_token_ids=ids("ab"), min_tokens=9, n=2)
        free = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        alone = generate(engine, "Once", free)[0].token_ids
        output, other = generate(engine, "Once", stuck, free)
        assert [completion.finish_reason for completion in output.outputs] == ["error", "error"]
        assert isinstance(output.error, DeadEndError) and "dead end" in str(output.error)
        assert other.token_ids == alone and engine.stats().num_used_blocks == 0

    def test_a_grammar_without_texts_is_a_dead_end(self, engine: LLMEngine) -> None:
        (output,) = generate(engine, "Once", params(30, json={"$ref": "#"}))
        assert (output.text, output.finish_reason) == ("", "error") and isinstance(output.error, DeadEndError)


class TestTogether:
    def test_others_are_undisturbed(self, checkpoint: Path) -> None:
        """Free requests give the tokens that they give alone, and so do constrained ones."""
        asked = [
            SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
            params(json=SCHEMA, temperature=1.0, seed=7),
            SamplingParams(max_tokens=40, temperature=1.0, seed=8, top_p=0.9, ignore_eos=True),
            params(40, regex="[ab ]*", temperature=1.0, seed=9, top_k=5),
            SamplingParams(max_tokens=40, temperature=0.7, seed=10, repetition_penalty=1.2, ignore_eos=True),
        ]
        for depth in (1, 2):
            with make_engine(checkpoint, overlap=depth) as engine:
                together = generate(engine, "Once upon", *asked)
                for output, one in zip(together, asked, strict=True):
                    assert output.token_ids == generate(engine, "Once upon", one)[0].token_ids

    def test_a_failed_step_loses_nothing(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_engine(checkpoint) as engine:
            asked = [params(json=SCHEMA, temperature=1.0, seed=seed) for seed in (1, 2)]
            expected = [output.token_ids for output in generate(engine, "Once", *asked)]
            executor, submit, number = engine._loop._executor, engine._loop._executor.submit, itertools.count()

            def failing(step: Any) -> Any:
                if next(number) % 3 == 1:
                    raise OSError("lost")
                return submit(step)

            monkeypatch.setattr(executor, "submit", failing)
            ids = [engine.add_request("Once", one) for one in asked]
            outputs: dict[str, GenerateOutput] = {}
            while len(outputs) < len(ids):
                for name in ids:
                    try:
                        if name not in outputs and (output := engine.get_output(name)) is not None:
                            outputs[name] = output
                    except OSError:
                        pass
            assert [outputs[name].token_ids for name in ids] == expected


class TestJson:
    def test_style(self, engine: LLMEngine) -> None:
        """One line, as Python writes it; properties in the schema's order, and no others."""
        (output,) = generate(engine, "Once", params(json=SCHEMA))
        value = json.loads(output.text)
        assert list(value) == ["town", "degrees", "scale"] and output.text == json.dumps(value)

    def test_text_and_object_are_the_same(self, engine: LLMEngine) -> None:
        first, second = generate(engine, "Once", params(json=SCHEMA), params(json=json.dumps(SCHEMA)))
        assert first.token_ids == second.token_ids

    def test_any_object(self, engine: LLMEngine) -> None:
        (output,) = generate(engine, "Once", params(300, json_object=True, logit_bias={ids('"')[0]: 4, ids("}")[0]: 3}))
        assert output.finish_reason == "length" or isinstance(json.loads(output.text), dict)
        assert output.text.startswith("{")


UNUSABLE: dict[str, dict[str, Any]] = {
    "regex that is none": {"regex": "[a"},
    "look-around": {"regex": "a(?=b)"},
    "back-reference": {"regex": r"(a)\1"},
    "grammar without a start": {"grammar": "a: b"},
    "grammar with an unknown rule": {"grammar": "start: nobody"},
    "a lone surrogate": {"regex": "\ud800"},
    "a schema that is no JSON": {"json": "{"},
    "a schema that is a list": {"json": "[1]"},
    "an unknown keyword": {"json": {"type": "object", "unevaluatedItems": False}},
    "an unknown type": {"json": {"type": "tree"}},
    "a reference to nowhere": {"json": {"$ref": "#/$defs/none"}},
    "too deep": {"json": '{"items":' * 10_000 + "{}" + "}" * 10_000},
    "a bit too deep": {"json": '{"items":' * 101 + "{}" + "}" * 101},
    "a regex too deep": {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    "too many properties": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(1001)}}},
    "too large a multiple": {"json": {"type": "integer", "multipleOf": 999_983}},
    "too large multiples together": {"json": {"anyOf": [{"multipleOf": 47}, {"multipleOf": 53}]}},
    "too many decimals": {"json": {"multipleOf": 1e-300}},
    "alternatives that multiply": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]}
    },
}


@pytest.mark.parametrize("grammar", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_grammars_are_refused_by_name(engine: LLMEngine, grammar: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        engine.make_request("Once", params(**grammar))


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({}, "none of them"),
    ({"disable_fallback": True}, "disable_fallback"),
    ({"json": {}, "regex": "a"}, "json and regex"),
    ({"regex": ""}, "non-empty string"),
    ({"regex": 5}, "non-empty string"),
    ({"choice": []}, "list of non-empty strings"),
    ({"choice": "yes"}, "list of non-empty strings"),
    ({"choice": ["a", ""]}, "list of non-empty strings"),
    ({"json": 5}, "JSON schema"),
    ({"json": {"enum": [{1, 2}]}}, "no JSON schema"),
    ({"json_object": 1}, "True or False"),
    ({"json": " " * 5_000_000}, "5000000 characters"),
    ({"regex": "a" * 5_000_000}, "5000000 characters"),
    ({"choice": ["a" * 3_000_000, "b" * 2_000_000]}, "5000000 characters"),
]


@pytest.mark.parametrize("options, words", MALFORMED)
def test_malformed_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        StructuredOutputsParams(**options)


def test_the_parameters_can_be_told_apart() -> None:
    schema = {"type": "object"}
    assert params(json=schema) == params(json=json.dumps(schema)) and hash(params(json=schema)) is not None
    as_mapping: Any = {"json": schema}
    assert SamplingParams(structured_outputs=as_mapping).structured_outputs == params(json=schema).structured_outputs
    for unusable in ("{}", {"jsn": schema}, {"structural_tag": "x"}):
        with pytest.raises(InvalidRequestError, match=r"structured_outputs must be|did you mean 'json'|structural_tag"):
            SamplingParams(structured_outputs=unusable)  # type: ignore[arg-type]


class TestClosedObjects:
    """A schema that is silent about further properties gets none; what is written is valid for it all the same."""

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a", "b"]},
            {"type": "object", "properties": {"a": {"const": 1}}, "minProperties": 2},
            {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": True},
        ],
    )
    def test_stay_open_where_they_must(self, schema: dict[str, Any]) -> None:
        from mini_infer.engine.rules.schema import checked_schema

        assert checked_schema(json.dumps(schema)) == schema

    def test_a_property_called_like_a_keyword(self) -> None:
        from mini_infer.engine.rules.schema import checked_schema

        schema = {"properties": {"allOf": {"properties": {"x": True}}}}
        closed = checked_schema(json.dumps(schema))
        assert closed["additionalProperties"] is closed["properties"]["allOf"]["additionalProperties"] is False
