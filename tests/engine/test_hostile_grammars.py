"""Grammars made to take for ever, or all the memory: each is refused by name or followed within bounds, and whoever
runs beside it gets the very tokens that it gets alone."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLMEngine, SamplingParams, StructuredOutputsParams
from mini_infer.exceptions import InvalidRequestError

from .checkpoints import make_engine_checkpoint

MEGABYTES = 100
SECONDS = 10
"""Of processor time, for a request from its beginning to its end; on an idle machine the worst takes 0.4."""


def chain(length: int, link: Any, end: Any) -> dict[str, Any]:
    """A schema that refers to a second one, which refers to a third one, and so on."""
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": end}}


REFUSED: dict[str, dict[str, Any]] = {
    "nested groups": {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    "counts of counts": {"regex": "(a{1000}){1000}"},
    "a huge count": {"regex": "a{4294967296000}"},
    "counts in a pattern": {"json": {"type": "string", "pattern": "^((a{100}){100}){100}$"}},
    "counts in a name": {"json": {"patternProperties": {"^(a{1000}){1000}$": {}}}},
    "counts in a terminal": {"grammar": "start: A\nA: /(a{1000}){1000}/"},
    "terminals that double": {
        "grammar": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(30)) + 'A30: "x"'
    },
    "5 MB of regex": {"regex": "a" * 5_000_000},
    "5 MB of schema": {"json": json.dumps({"enum": ["x" * 100] * 50_000})},
    "nested arrays": {"json": '{"items":' * 10_000 + "{}" + "}" * 10_000},
    "nested rules": {"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000},
    "too many choices": {"choice": [f"c{i}" for i in range(30_000)]},
    "patterns that overlap": {"json": {"patternProperties": {f"^(a|b)*a(a|b){{{i}}}$": {} for i in range(30)}}},
}
BOUNDED: dict[str, dict[str, Any]] = {
    "optional row": {"regex": "(a?){2000}a{2000}"},
    "nth from the end": {"regex": r"(.|\n)*a(.|\n){300}"},
    "nested stars": {"regex": "((a*)*)*b"},
    "many words": {"regex": "|".join(f"word{i}" for i in range(10_000))},
    "many letters": {"regex": r"\p{L}{2000}"},
    "dots": {"regex": "(.*a.*){40}"},
    "unbounded whitespace": {"regex": r"\s*x"},
    "ignored whitespace": {"grammar": 'start: "x" "y"\n%ignore /[ \\n\\t]+/'},
    "as long as counts may be": {"regex": "x(a{200}){200}"},
    "a long choice": {"choice": ["x" * 100_000]},
    "counts of terminals": {"grammar": 'start: A\nA: B{1000}\nB: C{1000}\nC: "a"'},
    "a long terminal, and again": {"grammar": "start: A{100}\nA: /a{49000}/"},
    "a long text, and again": {"json": {"items": {"const": "x" * 100_000}, "minItems": 1000, "type": "array"}},
    "a text, and again": {"json": {"items": {"const": "x" * 240}, "minItems": 10**6, "type": "array"}},
    "a word, and again": {"json": {"items": {"const": "x" * 10}, "minItems": 10**6, "type": "array"}},
    "a text, doubled": {"json": chain(30, lambda r: {"prefixItems": [r, r], "minItems": 2}, {"const": "x" * 240})},
    "many values": {"json": {"enum": [f"{i:08}" for i in range(10_000)]}},
    "ambiguous rules": {"grammar": 'start: a\na: a a | "x" | '},
    "rules that double": {
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "x"'
    },
    "references that double": {"json": chain(30, lambda r: {"prefixItems": [r, r], "minItems": 2}, {"type": "null"})},
    "all of two, and again": {"json": chain(25, lambda r: {"allOf": [r, r]}, {"type": "null"})},
    "any of two, and again": {"json": chain(25, lambda r: {"anyOf": [r, r]}, {"type": "null"})},
    "a million items": {"json": {"items": {"items": {"maxItems": 10**6}}, "minItems": 10**6, "type": "array"}},
    "ten million letters": {"json": {"type": "string", "minLength": 10_000_000}},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMEngine]:
    path = make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1, max_position_embeddings=512)
    with LLMEngine(model=path, dtype="float32", device="cpu", num_gpu_blocks=200) as engine:
        attack(engine, {"choice": ["x"]})  # the vocabulary is read once
        yield engine


def peak_megabytes() -> float:
    """Most memory that this process held since it was last asked to forget."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def attack(engine: LLMEngine, grammar: dict[str, Any]) -> list[int]:
    """Run a request with a grammar beside one without; the tokens of the latter."""
    beside = engine.make_request([5, 6], SamplingParams(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True))
    engine.submit(beside)
    engine.step()
    try:
        structured = StructuredOutputsParams(**grammar)
        hostile = SamplingParams(max_tokens=24, temperature=2.0, seed=1, structured_outputs=structured)
        request = engine.make_request([1, 2, 3], hostile)
        engine.submit(request)
        while not request.finished:
            engine.step()
    finally:
        while not beside.finished:
            engine.step()
    return beside.output().token_ids


def check(engine: LLMEngine, grammar: dict[str, Any], is_refused: bool) -> None:
    alone = attack(engine, {"choice": ["x"]})
    is_linux = sys.platform == "linux"
    if is_linux:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = peak_megabytes()
    start = time.process_time()
    if is_refused:
        with pytest.raises(InvalidRequestError) as refusal:
            attack(engine, grammar)
        assert len(str(refusal.value)) < 1000
    else:
        assert attack(engine, grammar) == alone
    assert time.process_time() - start < SECONDS
    assert not is_linux or peak_megabytes() - before < MEGABYTES
    assert engine.stats().num_used_blocks == 0 and attack(engine, {"choice": ["x"]}) == alone


@pytest.mark.parametrize("grammar", REFUSED.values(), ids=REFUSED)
def test_refused(engine: LLMEngine, grammar: dict[str, Any]) -> None:
    check(engine, grammar, is_refused=True)


@pytest.mark.parametrize("grammar", BOUNDED.values(), ids=BOUNDED)
def test_bounded(engine: LLMEngine, grammar: dict[str, Any]) -> None:
    check(engine, grammar, is_refused=False)
