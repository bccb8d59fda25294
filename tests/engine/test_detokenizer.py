"""Text that comes token by token: never half a character, never half a stop string, and it all adds up."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mini_infer.config import EngineConfig
from mini_infer.engine.detokenizer import Detokenizer, StopStringMatcher
from mini_infer.engine.tokenizer import Tokenizer
from tests.engine.checkpoints import save_tokenizer

BROKEN = "\ufffd"
SEEDS = range(12)

# One, two, three and four bytes; characters made of several code points.
ALPHABET = [
    *"abc xyz,.\n\t0",
    *"éß\u0301\u0302",
    *"你好世界，。注意力",
    *"한글कि",
    *"😀🤖𠮷𝔸",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇨🇳",
    "👍🏽",
    "e\u0301\u0323",
]

CORPUS = [
    "the key cache and the value cache are split into blocks of tokens",
    "what is a block, what is a token, and what is the cache?",
    "分页注意力把键和值的缓存分成块。什么是块？什么是词元？",
    "注意力的缓存是键和值，块是词元的缓存。",
    "😀😀🤖 the 🤖 块",
]


def random_text(seed: int, size: int = 60) -> str:
    draw = random.Random(seed)
    return "".join(draw.choices(ALPHABET, k=size))


def byte_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """One token per byte."""
    return save_tokenizer(directory)


def trained_bpe(directory: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as in GPT-2 and Qwen: tokens may hold one character and half of the next."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|eos|>", "<|end|>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|eos|>", additional_special_tokens=["<|end|>"]
    )


def sentencepiece_like(directory: Path) -> PreTrainedTokenizerFast:
    """As in Llama 2 and Mistral: "▁" for a space, bytes for what is not in the vocabulary, one leading space dropped.

    Its decoder takes a run of byte tokens as a whole: a run that ends in an unfinished character has no readable one.
    """
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    for piece in [*"▁abcdefhiklnoprstuvwxyz,.?块的", "▁t", "he", "▁the", "▁c", "he▁"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "c")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(directory: Path) -> PreTrainedTokenizerFast:
    """As in T5: pieces with scores, "▁" for a space, and nothing to fall back on."""
    return unigram_tokenizer(byte_fallback=False)


def unigram_with_bytes(directory: Path) -> PreTrainedTokenizerFast:
    """The same with bytes for what is not in the vocabulary."""
    return unigram_tokenizer(byte_fallback=True)


def unigram_tokenizer(byte_fallback: bool) -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(word, -3.0) for word in ("▁the", "▁a", "▁cat", "▁▁")]
    pieces += [(letter, -5.0) for letter in f"▁abcdefghijklmnopqrstuvwxyz.,?{BROKEN}块的"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MAKERS = (byte_tokenizer, trained_bpe, sentencepiece_like)  # those that can spell every text
ALL_MAKERS = (*MAKERS, unigram, unigram_with_bytes)


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(byte_tokenizer, tmp_path_factory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(sentencepiece_like, tmp_path_factory)


def make_tokenizer(
    maker: Callable[[Path], PreTrainedTokenizerFast], tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """The engine's own tokenizer, read from files as it always is."""
    directory = tmp_path_factory.mktemp(maker.__name__)
    maker(directory).save_pretrained(directory)
    return load(directory)


def load(directory: Path) -> Tokenizer:
    vocab = AutoTokenizer.from_pretrained(directory).get_vocab()
    return Tokenizer(directory, EngineConfig(), max(vocab.values()) + 3)  # a model often has a few ids to spare


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.hf.encode(text, add_special_tokens=False)
    return ids


def stream(
    tokenizer: Tokenizer, chunks: Iterable[Sequence[int]], prompt: Sequence[int] = (), *, skip_special: bool = True
) -> list[str]:
    """The pieces that come, and the rest that the end releases."""
    detokenizer = tokenizer.detokenizer(prompt, skip_special)
    return [*map(detokenizer.append, chunks), detokenizer.end()]


def one_by_one(token_ids: Sequence[int]) -> list[list[int]]:
    return [[token_id] for token_id in token_ids]


class TestWholeText:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_pieces_add_up_to_the_text(self, tokenizer: Tokenizer, seed: int) -> None:
        token_ids = encode(tokenizer, random_text(seed))
        assert "".join(stream(tokenizer, one_by_one(token_ids))) == tokenizer.decode(token_ids, True)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_no_piece_is_broken(self, tokenizer: Tokenizer, seed: int) -> None:
        text = random_text(seed)
        pieces = stream(tokenizer, one_by_one(encode(tokenizer, text)))
        assert [piece for piece in pieces if BROKEN in piece] == []
        assert "".join(pieces).split() == text.split()  # a tokenizer may drop one leading space

    @pytest.mark.parametrize("seed", SEEDS)
    def test_tokens_may_come_several_at_once(self, tokenizer: Tokenizer, seed: int) -> None:
        token_ids, draw = encode(tokenizer, random_text(seed)), random.Random(seed)
        chunks, rest = [], token_ids
        while rest:
            size = draw.randrange(1, 6)
            chunks.append(rest[:size])
            rest = rest[size:]
        assert "".join(stream(tokenizer, chunks)) == tokenizer.decode(token_ids, True)

    @pytest.mark.parametrize(
        "text",
        [
            "国文",  # two characters in a row that sentencepiece_like can only spell in bytes
            "a国文b",
            "👩‍👩‍👧‍👦",
            "块国块文块",
            "  two spaces,  and  more ",
            " ",
            "the cat",
            "e\u0301\u0323 e\u0301",
            "\x00\x7f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff",
        ],
        ids=ascii,
    )
    def test_particular_texts(self, tokenizer: Tokenizer, text: str) -> None:
        token_ids = encode(tokenizer, text)
        pieces = stream(tokenizer, one_by_one(token_ids))
        assert "".join(pieces) == tokenizer.decode(token_ids, True)
        assert not any(BROKEN in piece for piece in pieces)

    @pytest.mark.parametrize("text", [f"a{BROKEN}b", f"{BROKEN * 5}b", f"你{BROKEN}{BROKEN}好"], ids=ascii)
    def test_a_replacement_character_that_is_really_there(self, byte_level: Tokenizer, text: str) -> None:
        assert "".join(stream(byte_level, one_by_one(encode(byte_level, text)))) == text

    @pytest.mark.parametrize("text", ["你", "😀", "é", "a你", "你好", "你😀", "👩‍👧"], ids=ascii)
    def test_a_character_that_was_cut_waits_for_the_end(self, byte_level: Tokenizer, text: str) -> None:
        """At every place where a generation can be cut, what was shown is what is complete; the end shows the rest as
        every decoder does."""
        token_ids = encode(byte_level, text)
        for size in range(len(token_ids) + 1):
            *pieces, rest = stream(byte_level, one_by_one(token_ids[:size]))
            assert "".join(pieces) == text.encode()[:size].decode(errors="ignore")
            assert "".join(pieces) + rest == text.encode()[:size].decode(errors="replace")

    @pytest.mark.parametrize("text", ["国", "国文", "块国", "a文", "😀"], ids=ascii)
    def test_a_cut_run_of_byte_tokens_waits_for_the_end(self, sentencepiece: Tokenizer, text: str) -> None:
        token_ids = encode(sentencepiece, text)
        for size in range(len(token_ids) + 1):
            *pieces, rest = stream(sentencepiece, one_by_one(token_ids[:size]))
            assert text.startswith("".join(pieces)) and BROKEN not in "".join(pieces)
            assert "".join(pieces) + rest == sentencepiece.decode(token_ids[:size], True)

    def test_a_character_comes_with_its_last_byte(self, byte_level: Tokenizer) -> None:
        assert stream(byte_level, one_by_one(encode(byte_level, "a你😀"))) == ["a", "", "", "你", "", "", "", "😀", ""]

    def test_a_long_run_of_byte_tokens_does_not_wait(self, sentencepiece: Tokenizer) -> None:
        """It comes in whole characters, and what comes is not taken back when the run is spoilt later."""
        token_ids = encode(sentencepiece, "文国" * 30)
        bad = sentencepiece.hf.convert_tokens_to_ids("<0xFF>")
        *pieces, _ = stream(sentencepiece, one_by_one([*token_ids, bad]))
        shown = "".join(pieces)
        assert ("文国" * 30).startswith(shown) and len(shown) >= 60 - 11
        for size in range(len(token_ids)):
            assert 3 * len("".join(pieces[: size + 1])) > size - 35

    def test_no_tokens_no_text(self, tokenizer: Tokenizer) -> None:
        assert stream(tokenizer, [[], [], []]) == ["", "", "", ""]

    def test_the_window_stays_small(self, tokenizer: Tokenizer) -> None:
        """The work per token must not grow with the text."""
        sizes = []

        def decode(token_ids: Sequence[int]) -> str:
            sizes.append(len(token_ids))
            return tokenizer.decode(token_ids, True)

        detokenizer = Detokenizer(decode, [])
        for token_id in encode(tokenizer, random_text(0, 500)):
            detokenizer.append([token_id])
        assert max(sizes) <= 24


class TestInvalidBytes:
    """A model may well produce bytes that are no text."""

    @pytest.mark.parametrize("seed", SEEDS)
    def test_random_bytes(self, byte_level: Tokenizer, seed: int) -> None:
        token_ids = byte_tokens(byte_level, random.Random(seed).randbytes(80))
        whole, (*pieces, rest) = byte_level.decode(token_ids, True), stream(byte_level, one_by_one(token_ids))
        assert "".join(pieces) + rest == whole
        assert rest in ("", BROKEN)  # a character may be open still

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_window_stays_small_whatever_comes(self, tokenizer: Tokenizer, seed: int) -> None:
        """Also where nothing is ever a character."""
        draw, sizes = random.Random(seed), []
        bytes_only = [*tokenizer.byte_tokens] or byte_tokens(tokenizer, range(128, 256))

        def decode(token_ids: Sequence[int]) -> str:
            sizes.append(len(token_ids))
            return tokenizer.decode(token_ids, True)

        token_ids = draw.choices(bytes_only, k=300)
        detokenizer = Detokenizer(decode, [], byte_tokens=tokenizer.byte_tokens)
        text = "".join(detokenizer.append([token_id]) for token_id in token_ids) + detokenizer.end()
        assert max(sizes) <= 64 and sum(sizes) < 40 * len(token_ids)
        if not tokenizer.byte_tokens:
            assert text == tokenizer.decode(token_ids, True)

    @pytest.mark.parametrize("start", ["", "a", "你"], ids=ascii)
    @pytest.mark.parametrize("end", ["a", "你", "😀"], ids=ascii)
    @pytest.mark.parametrize("bad", [b"\xff", b"\xe4\xbd", b"\x80\x80\x80\x80\x80", b"\xf0\x9f\x98", b"\xc0\xaf"])
    def test_invalid_bytes_in_the_middle_are_shown(
        self, byte_level: Tokenizer, start: str, bad: bytes, end: str
    ) -> None:
        text = start.encode() + bad + end.encode()
        shown = "".join(stream(byte_level, one_by_one(byte_tokens(byte_level, text))))
        assert shown == text.decode(errors="replace")
        assert BROKEN in shown and shown.endswith(end)


def byte_tokens(tokenizer: Tokenizer, data: Iterable[int]) -> list[int]:
    """The tokens of bytes that need not be text. ByteLevel writes a byte as itself or as one from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = tokenizer.hf.get_vocab()
    return [vocab[names[byte]] for byte in data]


class TestSpecialTokens:
    @pytest.mark.parametrize("skip_special", [True, False], ids=["skipped", "shown"])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_special_tokens_anywhere(self, tokenizer: Tokenizer, seed: int, skip_special: bool) -> None:
        draw = random.Random(seed)
        special = tokenizer.hf.all_special_ids
        token_ids = []
        for word in ("the ", "块的 ", "cat, ", "国", " 😀", "a") * 2:
            token_ids += encode(tokenizer, word) + draw.choices(special, k=draw.randrange(3))
        token_ids += encode(tokenizer, "a")
        shown = "".join(stream(tokenizer, one_by_one(token_ids), skip_special=skip_special))
        assert shown == tokenizer.decode(token_ids, skip_special)
        assert any(name in shown for name in tokenizer.hf.all_special_tokens) is not skip_special

    def test_only_special_tokens(self, tokenizer: Tokenizer) -> None:
        token_ids = [*tokenizer.hf.all_special_ids] * 5
        assert "".join(stream(tokenizer, one_by_one(token_ids))) == ""


class TestPrompt:
    @pytest.mark.parametrize("prompt", ["the", "the ", "块", "国", "a" * 40, "a,", "😀"], ids=ascii)
    @pytest.mark.parametrize("text", [" the cat", "the", "块 的", "国文", "  a"], ids=ascii)
    def test_the_prompt_is_context_and_no_text(self, tokenizer: Tokenizer, prompt: str, text: str) -> None:
        """The tokens of a text that begins with the prompt, cut behind it: their text is the rest."""
        before, after = encode(tokenizer, prompt), encode(tokenizer, prompt + text)
        if after[: len(before)] != before:
            before = encode(tokenizer, prompt)
            after = before + encode(tokenizer, text)
        whole = tokenizer.decode(after, True)
        shown = "".join(stream(tokenizer, one_by_one(after[len(before) :]), before))
        assert tokenizer.decode(before, True) + shown == whole

    def test_a_leading_space_depends_on_the_prompt(self, sentencepiece: Tokenizer) -> None:
        the = [sentencepiece.hf.get_vocab()["▁the"]]
        assert stream(sentencepiece, [the]) == ["the", ""]
        assert stream(sentencepiece, [the], the) == [" the", ""]

    def test_a_prompt_that_ends_within_a_character(self, byte_level: Tokenizer) -> None:
        first, *rest = encode(byte_level, "你")
        assert "".join(stream(byte_level, one_by_one(rest), [first])) == "你"
        assert stream(byte_level, one_by_one(encode(byte_level, "a")), [first]) == ["a", ""]

    def test_a_prompt_that_ends_within_a_byte_token_character(self, sentencepiece: Tokenizer) -> None:
        """The character before, of the same run, is the prompt's."""
        token_ids = encode(sentencepiece, "文国")
        assert token_ids[-6] in sentencepiece.byte_tokens
        for size in range(4, 6):
            assert "".join(stream(sentencepiece, one_by_one(token_ids[size:]), token_ids[:size])) == "国"

    def test_a_run_of_the_prompt_that_is_spoilt(self, sentencepiece: Tokenizer) -> None:
        """Its characters do not come again as replacement characters."""
        bad = sentencepiece.hf.convert_tokens_to_ids("<0xFF>")
        assert "".join(stream(sentencepiece, [[bad, bad]], encode(sentencepiece, "文国"))) == 2 * BROKEN


class TestExactly:
    """The text is decode(prompt + tokens) without its beginning decode(prompt)."""

    @pytest.mark.parametrize("maker", ALL_MAKERS, ids=lambda maker: maker.__name__)
    def test_random_tokens_after_random_prompts(
        self, maker: Callable[[Path], PreTrainedTokenizerFast], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        tokenizer = make_tokenizer(maker, tmp_path_factory)
        seed = random.randrange(10**9)
        print("seed", seed)
        draw = random.Random(seed)
        num_ids = max(tokenizer.hf.get_vocab().values()) + 3
        letters = ["a", "the ", "你", "😀", " ", BROKEN, "块", "é", ", ", "<|end|>", "</s>"]

        def tokens() -> list[int]:
            if draw.random() < 0.5:
                return [draw.randrange(num_ids) for _ in range(draw.randrange(14))]
            return encode(tokenizer, "".join(draw.choices(letters, k=draw.randrange(12))))[: draw.randrange(1, 60)]

        num_plain = 0
        for _ in range(600):
            prompt, answer, skip_special = tokens(), tokens(), draw.random() < 0.5
            text = "".join(stream(tokenizer, one_by_one(answer), prompt, skip_special=skip_special))
            before, whole = (hf_decode(tokenizer, ids, skip_special) for ids in (prompt, prompt + answer))
            if whole.startswith(before):
                num_plain += 1
                assert text == whole[len(before) :], (prompt, answer, skip_special)
            else:  # the tokens complete a character of the prompt's, or spoil it
                assert before.endswith(BROKEN) or set(tokenizer.byte_tokens) & set(answer[:4])
                alone = hf_decode(tokenizer, answer, skip_special)
                assert whole.endswith(text) or text in (alone, " " + alone), (prompt, answer, skip_special)
        assert num_plain > 500


def hf_decode(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special: bool) -> str:
    text: str = tokenizer.hf.decode(token_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
    return text


class TestTokenBytes:
    """What each token adds to a text, by itself."""

    @pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
    @pytest.mark.parametrize("seed", SEEDS[:3])
    def test_joined_they_are_the_text(
        self, maker: Callable[[Path], PreTrainedTokenizerFast], tmp_path_factory: pytest.TempPathFactory, seed: int
    ) -> None:
        tokenizer, text = make_tokenizer(maker, tmp_path_factory), "x " + random_text(seed)
        joined = b"".join(map(tokenizer.token_bytes, encode(tokenizer, text)))
        assert joined.decode().removeprefix(" ") == text

    def test_of_sentencepiece(self, sentencepiece: Tokenizer) -> None:
        vocab = sentencepiece.hf.get_vocab()
        expected = {"▁the": b" the", "he": b"he", "▁": b" ", "<0xF0>": b"\xf0", "块": "块".encode(), "</s>": b"</s>"}
        assert {name: sentencepiece.token_bytes(vocab[name]) for name in expected} == expected
        assert sentencepiece.token_text(vocab["<0xF0>"]) == BROKEN and sentencepiece.token_text(vocab["▁t"]) == " t"

    def test_of_a_byte_level_vocabulary(self, byte_level: Tokenizer) -> None:
        """Every token is a byte here, so the truth is the byte."""
        token_ids = byte_tokens(byte_level, range(256))
        assert [byte_level.token_bytes(token_id) for token_id in token_ids] == [bytes([byte]) for byte in range(256)]
        assert byte_level.token_text(byte_level.hf.eos_token_id) == "<|eos|>"

    def test_an_id_without_a_token_has_none(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.token_bytes(max(tokenizer.hf.get_vocab().values()) + 1) == b""


STOP_SETS = [
    ["b"],
    ["ab"],
    ["ab", "b"],
    ["ab", "abb"],  # one is the beginning of the other
    ["abb", "ba"],  # they overlap
    ["aab", "ab", "bb"],
    ["aaa"],
    ["abab", "bba"],
    ["abc", "b"],
    ["ca", "cb", "cca"],
]


def stopped(pieces: Sequence[str], stop_strings: Sequence[str]) -> tuple[str, str | None]:
    """By brute force: the first piece that completes stop strings ends the text where the earliest of them begins."""
    text = ""
    for piece in pieces:
        text += piece
        found = [(text.index(stop), len(stop), stop) for stop in stop_strings if stop in text]
        if found:
            position, _, stop = min(found)
            return text[:position], stop
    return text, None


def match(pieces: Sequence[str], stop_strings: Sequence[str]) -> tuple[list[str], str | None]:
    """What a matcher releases, piece by piece, with what it held back at the end."""
    matcher = StopStringMatcher(stop_strings)
    released = []
    for piece in pieces:
        text, stop = matcher.append(piece)
        released.append(text)
        if stop is not None:
            return released, stop
    return [*released, matcher.flush()], None


def splits(text: str, draw: random.Random) -> list[str]:
    cuts = sorted({0, len(text), *(draw.randrange(len(text) + 1) for _ in range(draw.randrange(5)))})
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def matches(pieces: Sequence[tuple[str, bool]], stop_strings: Sequence[str]) -> set[tuple[int, str]]:
    """How much of the shown text is before each stop string, with any of the hidden pieces left out."""
    found = set()
    for kept in itertools.product([True, False], repeat=len(pieces)):
        if all(keeps or not is_shown for keeps, (_, is_shown) in zip(kept, pieces, strict=True)):
            view = [
                (character, is_shown)
                for keeps, (piece, is_shown) in zip(kept, pieces, strict=True)
                for character in piece
                if keeps
            ]
            text = "".join(character for character, _ in view)
            for stop in stop_strings:
                if stop in text:
                    found.add((sum(is_shown for _, is_shown in view[: text.index(stop)]), stop))
    return found


class TestStopStrings:
    @pytest.mark.parametrize("stop_strings", STOP_SETS, ids=",".join)
    def test_every_short_text_letter_by_letter(self, stop_strings: list[str]) -> None:
        letters = sorted(set("".join(stop_strings)) | {"a", "b"})
        for size in range(8 if len(letters) == 2 else 6):
            for text in itertools.product(letters, repeat=size):
                released, stop = match(text, stop_strings)
                assert ("".join(released), stop) == stopped(text, stop_strings), text

    @pytest.mark.parametrize("seed", SEEDS)
    def test_random_texts_in_random_pieces(self, seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            stop_strings = ["".join(draw.choices("abc", k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 4))]
            pieces = splits("".join(draw.choices("abcd", k=draw.randrange(20))), draw)
            released, stop = match(pieces, stop_strings)
            expected = stopped(pieces, stop_strings)
            assert ("".join(released), stop) == expected, (pieces, stop_strings)
            assert not any(s in "".join(released) for s in stop_strings)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_nothing_is_held_without_need(self, seed: int) -> None:
        """What is held back is always the beginning of a stop string, and the longest end that is one."""
        draw = random.Random(seed)
        for _ in range(100):
            stop_strings = ["".join(draw.choices("ab", k=draw.randrange(1, 6))) for _ in range(2)]
            matcher, seen, shown = StopStringMatcher(stop_strings), "", ""
            for letter in draw.choices("abc", k=12):
                text, stop = matcher.append(letter)
                if stop is not None:
                    break
                seen, shown = seen + letter, shown + text
                ends = [seen[i:] for i in range(len(seen)) if any(s.startswith(seen[i:]) for s in stop_strings)]
                assert seen == shown + max(ends, key=len, default=""), (seen, stop_strings)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_hidden_text_is_searched_and_not_shown(self, seed: int) -> None:
        """By brute force: with every choice of the hidden pieces left out."""
        draw = random.Random(seed)
        for _ in range(150):
            stop_strings = ["".join(draw.choices("abc", k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 4))]
            pieces = [(piece, draw.random() < 0.5) for piece in splits("".join(draw.choices("abc", k=14)), draw)]
            matcher, released = StopStringMatcher(stop_strings).fresh(), ""
            for size, (piece, is_shown) in enumerate(pieces, 1):
                text, stop = matcher.append(piece, shown=is_shown)
                released += text
                found = matches(pieces[:size], stop_strings)
                assert (stop is not None) == bool(found), (pieces, stop_strings)
                shown = "".join(piece for piece, is_shown in pieces[:size] if is_shown)
                if stop is not None:
                    first = min(place for place, _ in found)
                    assert released == shown[:first] and (first, stop) in found, (pieces, stop_strings)
                    break
                assert shown.startswith(released)
            else:
                assert released + matcher.flush() == shown

    def test_the_work_does_not_grow_with_what_is_held(self) -> None:
        """Long stop strings that agree for long with the text and with each other, counted in steps of the matcher."""
        steps = 0

        class Counting(StopStringMatcher):
            def _step(self, view: Any, character: str, shown: bool) -> Any:
                nonlocal steps
                steps += 1
                return super()._step(view, character, shown)

        matcher = Counting(["a" * 500 + "!", *("b" + "a" * 500 + chr(99 + place) for place in range(63))])
        text = "".join(matcher.append("a" * 7)[0] for _ in range(2000))
        assert steps == 14000 and len(text) == 14000 - 500

    def test_a_stop_string_over_several_pieces(self) -> None:
        assert match(["x<", "/", "s", ">y"], ["</s>"]) == (["x", "", "", ""], "</s>")

    def test_what_only_looked_like_one_is_released(self) -> None:
        assert match(["x<", "/", "b", ">"], ["</s>"]) == (["x", "", "</b", ">", ""], None)

    def test_what_is_held_at_the_end_is_flushed_once(self) -> None:
        matcher = StopStringMatcher(["</s>"])
        assert matcher.append("x</s") == ("x", None)
        assert [matcher.flush(), matcher.flush()] == ["</s", ""]

    def test_chinese_and_emoji(self) -> None:
        assert match(["你好。", "用户", "：问"], ["用户：", "\n"]) == (["你好。", "", ""], "用户：")
        assert match(["👩‍", "👧"], ["👩‍👧"]) == (["", ""], "👩‍👧")

    def test_without_stop_strings_all_is_released_at_once(self) -> None:
        assert match(["a", "", "b"], []) == (["a", "", "b", ""], None)

    def test_text_behind_the_stop_string_is_dropped(self) -> None:
        assert match(["one\n\ntwo"], ["\n\n"]) == (["one"], "\n\n")
