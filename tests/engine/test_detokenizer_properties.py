"""Properties of incremental text that hypothesis looks for exceptions to."""

import itertools
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed; it is among the dev requirements")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mini_infer.engine.tokenizer import Tokenizer
from tests.engine.test_detokenizer import (
    BROKEN,
    byte_tokenizer,
    byte_tokens,
    encode,
    hf_decode,
    load,
    match,
    one_by_one,
    sentencepiece_like,
    stopped,
    stream,
    trained_bpe,
)

MAKERS = {"bytes": byte_tokenizer, "bpe": trained_bpe, "sentencepiece": sentencepiece_like}
PATIENT = settings(max_examples=150, deadline=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("你好😀👩\u200d\u0301 ab"), max_size=30)


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _make("bytes", tmp_path_factory.mktemp("bytes"))


def _make(name: str, directory: Path) -> Tokenizer:
    MAKERS[name](directory).save_pretrained(directory)
    return load(directory)


@PATIENT
@given(text=TEXT)
def test_any_text_comes_out_whole(tokenizer: Tokenizer, text: str) -> None:
    token_ids = encode(tokenizer, text.replace(BROKEN, ""))
    pieces = stream(tokenizer, one_by_one(token_ids))
    assert "".join(pieces) == tokenizer.decode(token_ids, True)
    assert not any(BROKEN in piece for piece in pieces)


@PATIENT
@given(data=st.binary(max_size=120), sizes=st.lists(st.integers(1, 5) | st.integers(1, 100), max_size=40))
def test_any_bytes_come_out_as_the_tokenizer_decodes_them(byte_level: Tokenizer, data: bytes, sizes: list[int]) -> None:
    token_ids = byte_tokens(byte_level, data)
    cuts = [cut for cut in itertools.accumulate(sizes) if cut < len(token_ids)]
    chunks = [token_ids[start:end] for start, end in itertools.pairwise([0, *cuts, len(token_ids)])]
    *pieces, rest = stream(byte_level, chunks)
    assert "".join(pieces) + rest == data.decode(errors="replace")
    assert rest in ("", BROKEN)


@PATIENT
@given(prompt=TEXT, text=TEXT)
def test_any_prompt_is_only_context(byte_level: Tokenizer, prompt: str, text: str) -> None:
    token_ids = encode(byte_level, text)
    assert "".join(stream(byte_level, one_by_one(token_ids), encode(byte_level, prompt))) == text


@PATIENT
@given(data=st.data())
def test_any_tokens_come_out_as_the_tokenizer_decodes_them(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Behind any prompt whose text they do not change."""
    ids = st.lists(st.integers(0, max(tokenizer.hf.get_vocab().values())), max_size=20)
    prompt, answer, skip_special = data.draw(ids), data.draw(ids), data.draw(st.booleans())
    before, whole = (hf_decode(tokenizer, token_ids, skip_special) for token_ids in (prompt, prompt + answer))
    assume(whole.startswith(before))
    for portions in (one_by_one(answer), [answer]):
        assert before + "".join(stream(tokenizer, portions, prompt, skip_special=skip_special)) == whole


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
