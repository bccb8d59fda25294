"""Tokenizers from GGUF files: ids as transformers and llama.cpp's own conversions have them."""

import json
import random
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models.gguf import read_tokenizer

CORPUS = [
    "Hello, world! 12345 + 3.14 = 12348.14",
    "def f(x):\n\treturn x ** 2  if x > 1e-10 else None  # naïve",
    "你好，世界！深度学习的推理引擎。",
    "😀 👩‍👩‍👧 emoji, and a flag: 🇨🇭",
    "  leading, trailing   and\n\n\nempty lines \t ",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n",
    "'s 'T 're it's I'LL",
    "",
]


def write_tokenizer(path: Path, **keys: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level tokenizer with a few hundred merges of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_byte_level(tmp_path: Path, pre: str) -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")

    def split(pattern: str) -> pre_tokenizers.PreTokenizer:
        from tokenizers import Regex

        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    right = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "gpt-2": plain,
        "qwen2": split(PRETOKENIZE_REGEX),
        "llama-bpe": split(llama3),
    }[pre]
    tokenizer = trained(right)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    path = write_tokenizer(
        tmp_path / "t.gguf",
        add_tokenizer_model="gpt2",
        add_tokenizer_pre=pre,
        add_token_list=tokens,
        add_token_merges=merges,
        add_token_types=[3 if token.startswith("<|") else 1 for token in tokens],
        add_bos_token_id=vocab["<|im_start|>"],
        add_eos_token_id=vocab["<|im_end|>"],
        add_add_bos_token=pre == "gpt-2",
        add_chat_template="{{ messages[0].content }}!",
    )
    ours, ends = read_tokenizer(path)
    assert ends == {vocab["<|im_end|>"]}
    for text in CORPUS:
        begin = [vocab["<|im_start|>"]] if pre == "gpt-2" else []
        assert ours.encode(text) == begin + tokenizer.encode(text).ids, text
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    assert ours.decode([vocab["<|im_end|>"]], skip_special_tokens=True) == ""


def test_sentencepiece(tmp_path: Path) -> None:
    """Against brute force: whichever pair of neighbours makes the token with the best score is merged first."""
    draw = random.Random(0)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdef你"]
    words = {"".join(draw.choices("▁abcdef", k=draw.randint(2, 5))) for _ in range(150)}
    pieces += sorted(words)
    scores = [0.0] * 259 + [-1e6] * 8 + [-float(draw.randint(1, 40)) - place / 1000 for place in range(len(words))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    path = write_tokenizer(
        tmp_path / "t.gguf",
        add_tokenizer_model="llama",
        add_token_list=pieces,
        add_token_scores=scores,
        add_token_types=kinds,
        add_bos_token_id=1,
        add_eos_token_id=2,
        add_unk_token_id=0,
    )
    ours, ends = read_tokenizer(path)
    assert ends == {2}
    vocab = {piece: place for place, piece in enumerate(pieces)}

    def right(text: str) -> list[int]:
        parts = list(("▁" + text).replace(" ", "▁"))
        while True:
            pairs = [(scores[vocab[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in vocab]
            if not pairs:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids = [1]
        for part in parts:
            ids += [vocab[part]] if part in vocab else [vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
        return ids

    for _ in range(200):
        text = "".join(draw.choices("abcdef 你é", k=draw.randint(1, 12)))
        assert ours.encode(text) == right(text), text
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_what_is_refused(tmp_path: Path) -> None:
    tokens: dict[str, object] = {"add_token_list": ["a", "b"], "add_token_types": [1, 1]}
    with pytest.raises(
        UnsupportedModelError, match=r"tokenizer\.ggml\.pre 'strange', how texts are cut up, is not known"
    ):
        read_tokenizer(
            write_tokenizer(tmp_path / "a.gguf", add_tokenizer_model="gpt2", add_tokenizer_pre="strange", **tokens)
        )
    with pytest.raises(UnsupportedModelError, match="tokenizer 'bert' is not supported"):
        read_tokenizer(write_tokenizer(tmp_path / "b.gguf", add_tokenizer_model="bert", **tokens))
    with pytest.raises(InvalidCheckpointError, match=r"tokenizer\.ggml\.scores is missing"):
        read_tokenizer(write_tokenizer(tmp_path / "c.gguf", add_tokenizer_model="llama", **tokens))
    with pytest.raises(InvalidCheckpointError, match="there is no tokenizer in it"):
        read_tokenizer(write_tokenizer(tmp_path / "d.gguf"))
    with pytest.raises(InvalidCheckpointError, match=r"bos_token_id must be one of 2 tokens; got 7"):
        read_tokenizer(
            write_tokenizer(
                tmp_path / "e.gguf",
                add_tokenizer_model="llama",
                add_token_scores=[0.0, 0.0],
                add_bos_token_id=7,
                **tokens,
            )
        )
