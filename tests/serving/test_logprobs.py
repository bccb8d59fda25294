"""Log probabilities in OpenAI's two shapes: tokens that join to the text, each at its place, none merged."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mini_infer.engine.detokenizer import StopStringMatcher, TextStream
from mini_infer.engine.tokenizer import Tokenizer
from mini_infer.exceptions import InvalidRequestError
from mini_infer.outputs import Logprob, TokenLogprobs
from mini_infer.sampling import SamplingParams
from mini_infer.serving.limits import Limits
from mini_infer.serving.logprobs import CompletionLogprobs, chat_logprobs
from tests.engine.test_detokenizer import (
    ALL_MAKERS,
    byte_tokenizer,
    encode,
    make_tokenizer,
    sentencepiece_like,
    trained_bpe,
)

Maker = Callable[[Path], PreTrainedTokenizerFast]


def place_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> TokenLogprobs:
    """A place where the first of these tokens is; the numbers tell the tokens apart."""
    return {
        token_id: Logprob(-float(token_id), rank, tokenizer.token_text(token_id))
        for rank, token_id in enumerate(dict.fromkeys(token_ids), 1)
    }


def shape_of(made: CompletionLogprobs, shapes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [value for shape in shapes for value in shape[name]] for name in shapes[0]}


@pytest.mark.parametrize("skip_special", [True, False], ids=["skipped", "shown"])
@pytest.mark.parametrize("maker", ALL_MAKERS, ids=lambda maker: maker.__name__)
def test_tokens_join_to_the_text(maker: Maker, skip_special: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever comes, in whatever portions, with a prompt before it or without, and with stop strings that cut it."""
    tokenizer = make_tokenizer(maker, tmp_path_factory)
    seed = random.randrange(10**9)
    print("seed", seed)
    draw = random.Random(seed)
    letters = ["the ", "a", " ", "块", "你", "😀", "é", "\n", ", ", "</s>", "<|end|>"]
    left_out = tokenizer.special_tokens if skip_special else {}
    for _ in range(100):
        if draw.random() < 0.7:
            token_ids = encode(tokenizer, "".join(draw.choices(letters, k=10)))
        else:
            token_ids = [draw.randrange(max(tokenizer.hf.get_vocab().values())) for _ in range(12)]
        prompt = encode(tokenizer, "".join(draw.choices(letters, k=4)))
        stops = ["a,", "你"] if draw.random() < 0.3 else []
        hidden = left_out if stops else {}
        stream = TextStream(tokenizer.detokenizer(prompt, skip_special), StopStringMatcher(stops), hidden, True)
        made, text, shapes = CompletionLogprobs(tokenizer), "", []
        if draw.random() < 0.5:
            text = tokenizer.decode(prompt, skip_special_tokens=False)
            made.append(text, prompt, [None, *(place_of(tokenizer, [i]) for i in prompt[1:])], left_out={})
            token_ids_shown = [*prompt, *token_ids]
        else:
            token_ids_shown = token_ids
        pieces = [stream.append(token_id) for token_id in token_ids]
        pieces[-1] += stream.end()
        for number, (piece, token_id) in enumerate(zip(pieces, token_ids, strict=True), 1):
            text += piece
            made.append(piece, [token_id], [place_of(tokenizer, [token_id, 5, 6])], left_out=left_out)
            shapes.append(made.take(is_whole=number == len(pieces)))
        shape = shape_of(made, shapes)
        assert "".join(shape["tokens"]) == text, (prompt, token_ids, stops)
        assert len(shape["tokens"]) == len(token_ids_shown)
        for token, offset in zip(shape["tokens"], shape["text_offset"], strict=True):
            assert text[offset : offset + len(token)] == token
        values = [value for value in shape["token_logprobs"] if value is not None]
        assert values == [-float(i) for i in token_ids_shown][len(token_ids_shown) - len(values) :]
        for token, value, top in zip(shape["tokens"], shape["token_logprobs"], shape["top_logprobs"], strict=True):
            assert top is None or top[token] == value
        for token_id, top in zip(token_ids, shape["top_logprobs"][-len(token_ids) :], strict=True):
            assert sorted(top.values()) == sorted({-float(token_id), -5.0, -6.0})


@pytest.mark.parametrize("maker", [byte_tokenizer, trained_bpe, sentencepiece_like], ids=lambda maker: maker.__name__)
def test_valid_text_is_given_token_by_token(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each token adds the characters that it completes, with its own space."""
    tokenizer = make_tokenizer(maker, tmp_path_factory)
    token_ids = encode(tokenizer, "the 😀 cat 块国.")
    made = CompletionLogprobs(tokenizer)
    text = tokenizer.decode(token_ids, True)
    made.append(text, token_ids, [place_of(tokenizer, [i]) for i in token_ids], left_out={})
    shape, done = made.take(is_whole=True), b""
    for token_id, token in zip(token_ids, shape["tokens"], strict=True):
        before = done.decode(errors="ignore")
        done += tokenizer.token_bytes(token_id)
        assert before.lstrip(" ") + token == done.decode(errors="ignore").lstrip(" ")


def test_tokens_of_the_same_text_stay_two(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = make_tokenizer(sentencepiece_like, tmp_path_factory)
    vocab = tokenizer.hf.get_vocab()
    names = ["<0x61>", "a", "▁", "<0xF0>", "<0xF1>", "</s>"]
    made = CompletionLogprobs(tokenizer)
    made.append("a", [vocab["<0x61>"]], [place_of(tokenizer, [vocab[name] for name in names])], left_out={})
    (top,) = made.take(is_whole=True)["top_logprobs"]
    ids = {f"token_id:{vocab[name]}": -float(vocab[name]) for name in ("a", "<0xF0>", "<0xF1>")}
    assert top == {"a": -float(vocab["<0x61>"]), " ": -float(vocab["▁"]), "</s>": -float(vocab["</s>"]), **ids}


@pytest.mark.parametrize("maker", [byte_tokenizer, trained_bpe, sentencepiece_like], ids=lambda maker: maker.__name__)
def test_bytes_of_a_chat_join_to_the_text(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = make_tokenizer(maker, tmp_path_factory)
    text = "x 你好 😀 the e\u0301 国"
    token_ids = [*encode(tokenizer, text), tokenizer.hf.eos_token_id]

    def bytes_of(token_id: int) -> bytes:
        return b"" if token_id in tokenizer.special_tokens else tokenizer.token_bytes(token_id)

    places = [place_of(tokenizer, [token_id, 40, 41]) for token_id in token_ids]
    content = chat_logprobs(places, 2, bytes_of)["content"]
    assert content[-1]["bytes"] is None and all(entry["bytes"] for entry in content[:-1])
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode().removeprefix(" ") == text
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][1]["bytes"] == list(tokenizer.token_bytes(40))


@pytest.mark.parametrize("seed", range(3))
def test_the_size_of_an_answer_is_bounded(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        n, num_prompts, max_model_len = draw.choice([1, 8, 1024]), draw.choice([1, 5]), draw.choice([128, 131072])
        max_tokens, logprobs = draw.choice([None, 1, 900, 10**9]), draw.choice([None, 0, 20])
        params = SamplingParams(n=n, max_tokens=max_tokens, logprobs=logprobs)
        length = min(max_tokens or max_model_len, max_model_len)
        limits = Limits.of(max_model_len, 1 << 20, 16)
        size = n * num_prompts * length * ((logprobs or 0) + 1)
        if size <= limits.answer_size:
            limits.check_answer([[1]] * num_prompts, params, max_model_len)
        else:
            with pytest.raises(InvalidRequestError, match=str(limits.answer_size)):
                limits.check_answer([[1]] * num_prompts, params, max_model_len)
