"""Properties of incremental text that hypothesis looks for exceptions to."""

import itertools
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed; it is among the dev requirements")

from hypothesis import given, settings
from hypothesis import strategies as st

from mini_infer.config import EngineConfig
from mini_infer.engine.detokenizer import Detokenizer
from mini_infer.engine.tokenizer import Tokenizer
from tests.engine.checkpoints import save_tokenizer
from tests.engine.test_detokenizer import (
    BROKEN,
    byte_tokens,
    encode,
    match,
    one_by_one,
    sentencepiece_like,
    stopped,
    stream,
    trained_bpe,
)

PATIENT = settings(max_examples=150, deadline=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("你好😀👩\u200d\u0301 ab"), max_size=30)


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _make("bytes", tmp_path_factory.mktemp("bytes"))


def _make(name: str, directory: Path) -> Tokenizer:
    maker = {"bytes": save_tokenizer, "bpe": trained_bpe, "sentencepiece": sentencepiece_like}[name]
    maker(directory).save_pretrained(directory)
    return Tokenizer(directory, EngineConfig())


@PATIENT
@given(text=TEXT)
def test_any_text_comes_out_whole(tokenizer: Tokenizer, text: str) -> None:
    token_ids = encode(tokenizer, text.replace(BROKEN, ""))
    pieces = stream(tokenizer, one_by_one(token_ids))
    assert "".join(pieces) == tokenizer.decode(token_ids, True)
    assert not any(BROKEN in piece for piece in pieces)


@PATIENT
@given(data=st.binary(max_size=40), sizes=st.lists(st.integers(1, 5), max_size=40))
def test_any_bytes_come_out_as_the_tokenizer_decodes_them(byte_level: Tokenizer, data: bytes, sizes: list[int]) -> None:
    token_ids = byte_tokens(byte_level, data)
    cuts = [cut for cut in itertools.accumulate(sizes) if cut < len(token_ids)]
    chunks = [token_ids[start:end] for start, end in itertools.pairwise([0, *cuts, len(token_ids)])]
    whole, shown = data.decode(errors="replace"), "".join(stream(byte_level, chunks))
    assert whole.startswith(shown)
    assert whole[len(shown) :] in ("", BROKEN, 2 * BROKEN, 3 * BROKEN)


@PATIENT
@given(prompt=TEXT, text=TEXT)
def test_any_prompt_is_only_context(byte_level: Tokenizer, prompt: str, text: str) -> None:
    text = text.rstrip(BROKEN)
    detokenizer = Detokenizer(lambda ids: byte_level.decode(ids, True), encode(byte_level, prompt.rstrip(BROKEN)))
    assert "".join(detokenizer.append([token_id]) for token_id in encode(byte_level, text)) == text


@PATIENT
@given(
    pieces=st.lists(st.text("ab你\n", max_size=4), max_size=15),
    stop_strings=st.lists(st.text("ab你\n", min_size=1, max_size=5), max_size=4),
)
def test_no_stop_string_is_ever_shown(pieces: list[str], stop_strings: list[str]) -> None:
    released, stop = match(pieces, stop_strings)
    text, expected = stopped(pieces, stop_strings)
    assert ("".join(released), stop) == (text, expected)
    assert all(text.startswith(shown) for shown in itertools.accumulate(released))
