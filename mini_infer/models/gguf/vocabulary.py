"""The tokenizer of a GGUF file, as one of transformers': the vocabulary is the file's, the work is theirs.

A file names how a text is cut up before pairs are merged (``tokenizer.ggml.pre``), but not with which pattern. Those
are known here for the tokenizers of the families; with another one the ids could be silently wrong, so it is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models.gguf.file import GgufFile, split_files

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
"""Types of tokens, beside the normal ones (1) and single bytes (6)."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(digit_by_digit: bool) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not digit_by_digit:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


_PRE_TOKENIZERS: Mapping[str, pre_tokenizers.PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "mpt"), _gpt2(digit_by_digit=False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _gpt2(digit_by_digit=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral"), _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _split(_QWEN2)),
    "tekken": _split(_TEKKEN),
}
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "pixtral", "tekken"})
"""A word that is a token is that token, whatever its parts merge to."""
_BEGIN_WITH_BOS = frozenset({"llama-bpe", "llama3", "llama-v3", "pixtral", "tekken"})
"""Those of old files that do not say."""
_COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen", "megrez"})
"""Their texts are brought into Unicode's composed form (NFC)."""


class Vocabulary(NamedTuple):
    """A tokenizer, and all tokens that end an answer."""

    tokenizer: PreTrainedTokenizerFast
    end_ids: frozenset[int]


def read_tokenizer(path: Path) -> Vocabulary:
    """The tokenizer and the chat template in a file.

    Raises:
        InvalidCheckpointError: there is none, or it is damaged.
        UnsupportedModelError: it is of a kind that is not implemented.
    """
    metadata = GgufFile(split_files(path)[0]).metadata
    try:
        return _vocabulary(_Keys(metadata))
    except (UnsupportedModelError, InvalidCheckpointError) as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # tokenizers raises plain exceptions for a vocabulary that does not fit its merges
        raise InvalidCheckpointError(f"{path} has no usable tokenizer: {error}; fetch the file again") from error


class _Keys:
    """The keys below ``tokenizer.``, each checked when it is asked for."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def text(self, key: str) -> str | None:
        value = self._metadata.get(f"tokenizer.{key}")
        if value is not None and not isinstance(value, str):
            raise InvalidCheckpointError(f"tokenizer.{key} must be a text; got {type(value).__name__}")
        return value

    def texts(self, key: str) -> list[str] | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise InvalidCheckpointError(f"tokenizer.ggml.{key} must be a list of texts")
        return value

    def numbers(self, key: str, count: int) -> list[Any] | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not hasattr(value, "tolist") or len(value) != count:
            raise InvalidCheckpointError(f"tokenizer.ggml.{key} must have a number for each of the {count} tokens")
        numbers: list[Any] = value.tolist()
        return numbers

    def token(self, key: str, tokens: Sequence[str]) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None or (type(value) is int and value >= 2**31):  # how some files write that there is none
            return None
        if type(value) is not int or not 0 <= value < len(tokens):
            raise InvalidCheckpointError(
                f"tokenizer.ggml.{key}_token_id must be one of {len(tokens)} tokens; got {value!r}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._metadata.get(f"tokenizer.ggml.{key}", default))


def _vocabulary(keys: _Keys) -> Vocabulary:
    kind, tokens = keys.text("ggml.model"), keys.texts("tokens")
    if kind is None or not tokens:
        raise InvalidCheckpointError("there is no tokenizer in it; give --tokenizer a directory or Hub name with one")
    types = keys.numbers("token_type", len(tokens)) or [1] * len(tokens)
    vocab: dict[str, int] = {}
    for token_id, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ != _UNUSED:
            vocab.setdefault(token, token_id)
    match kind:
        case "gpt2":
            tokenizer, add_bos = _byte_level(keys, vocab)
        case "llama":
            tokenizer, add_bos = _sentencepiece(keys, vocab, tokens), True
        case _:
            raise UnsupportedModelError(
                f"tokenizer {kind[:80]!r} is not supported; supported are gpt2 and llama, or give --tokenizer"
            )
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, t in zip(tokens, types, strict=True)
            if t == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    ids = {name: keys.token(name, tokens) for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    named = {name: None if token_id is None else tokens[token_id] for name, token_id in ids.items()}
    begin = named["bos"] if keys.flag("add_bos_token", add_bos) else None
    end = named["eos"] if keys.flag("add_eos_token", False) else None
    if begin or end:
        around = [(token, vocab[token]) for token in (begin, end) if token]
        pieces = [*([begin] if begin else []), "$A", *([end] if end else [])]
        template = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=around)
        level = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
        tokenizer.post_processor = processors.Sequence([*level, template])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named["bos"],
        eos_token=named["eos"],
        unk_token=named["unknown"],
        pad_token=named["padding"],
        chat_template=keys.text("chat_template"),
        clean_up_tokenization_spaces=False,
    )
    ends = (ids["eos"], ids["eot"], ids["eom"])
    return Vocabulary(fast, frozenset(token_id for token_id in ends if token_id is not None))


def _byte_level(keys: _Keys, vocab: Mapping[str, int]) -> tuple[Tokenizer, bool]:
    """GPT-2's kind: every token is made of bytes, written as characters; and whether texts begin with BOS unless the
    file says otherwise."""
    pre, merges = keys.text("ggml.pre"), keys.texts("merges")
    if pre is None or pre not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre {str(pre)[:80]!r}, how texts are cut up, is not known here: ids would be wrong. Known "
            f"are {', '.join(_PRE_TOKENIZERS)}; give --tokenizer the directory or Hub name of the original"
        )
    if merges is None:
        raise InvalidCheckpointError("tokenizer.ggml.merges is missing")
    pairs = [(left, right) for left, space, right in (merge.partition(" ") for merge in merges) if space]
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre in _BEGIN_WITH_BOS


def _sentencepiece(keys: _Keys, vocab: Mapping[str, int], tokens: Sequence[str]) -> Tokenizer:
    """Llama 2's kind: scores say which pair is merged first, spaces are ▁, and what is no token is spelled in bytes."""
    scores = keys.numbers("scores", len(tokens))
    if scores is None:
        raise InvalidCheckpointError("tokenizer.ggml.scores is missing")
    unknown = keys.token("unknown", tokens)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=dict(vocab),
            merges=_merges(vocab, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", "▁")
    prefixed = keys.flag("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefixed else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that are a token together, those with the best score first."""
    found = []
    for token, token_id in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[token_id], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
