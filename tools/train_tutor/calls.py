"""Calls of tools: three functions of the tutor's own domain, questions that need them, and some that do not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .glossary import Glossary, Language
from .questions import as_typed, fill, unknown_word


def lookup_term(glossary: Glossary, language: Language, term: str) -> str:
    """What the glossary says of a term."""
    entries = (entry.entry(language) for entry in glossary.terms)
    return next((entry.answer for entry in entries if term in entry.names), "unknown term")


def kv_cache_size(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Bytes of keys and values in bfloat16."""
    return 2 * 2 * layers * kv_heads * head_dim * tokens


def count_blocks(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


PARAMETERS = {
    "lookup_term": {"term": "string"},
    "kv_cache_size": dict.fromkeys(("layers", "kv_heads", "head_dim", "tokens"), "integer"),
    "count_blocks": dict.fromkeys(("tokens", "block_size"), "integer"),
}


def tools() -> list[dict[str, Any]]:
    """The three, as chat templates have them."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {parameter: {"type": kind} for parameter, kind in parameters.items()},
                    "required": list(parameters),
                },
            },
        }
        for name, parameters in PARAMETERS.items()
    ]


def offer(names: Iterable[str] = PARAMETERS) -> str:
    """How the chat template shows them: few tokens, for a model with a short context."""
    return "".join(f"{name}({', '.join(PARAMETERS[name])})\n" for name in names)


TRAIN: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "lookup_term": (
            "Look up {term}.",
            "Look {term} up in the glossary.",
            "What does the glossary say of {term}?",
            "Search the glossary for {term}.",
            "Use the glossary: {term}",
            "Please look {term} up.",
            "Can you look up the term {term}?",
            "Find {term} in the glossary.",
            "I want to look up {term}.",
            "Check the glossary for {term}.",
        ),
        "kv_cache_size": (
            "How large is the KV cache of {tokens} tokens with {layers} layers, {kv_heads} KV heads and head_dim "
            "{head_dim}?",
            "KV cache size: {layers} layers, {kv_heads} KV heads, head_dim {head_dim}, {tokens} tokens.",
            "How many bytes does the KV cache take with {layers} layers, {kv_heads} KV heads, a head_dim of {head_dim} "
            "and {tokens} tokens?",
            "Compute the KV cache size for {kv_heads} KV heads of {head_dim} dimensions, {layers} layers and {tokens} "
            "tokens.",
            "A model has {layers} layers and {kv_heads} KV heads of size {head_dim}. How big is its KV cache at "
            "{tokens} tokens?",
            "{tokens} tokens, {layers} layers, {kv_heads} KV heads, head_dim {head_dim}: how many bytes of KV cache?",
            "With {layers} layers, {kv_heads} KV heads and head_dim {head_dim}, what do {tokens} tokens take in the KV "
            "cache?",
            "I need the KV cache size for {tokens} tokens: layers {layers}, KV heads {kv_heads}, head_dim {head_dim}.",
        ),
        "count_blocks": (
            "How many blocks do {tokens} tokens need with a block size of {block_size}?",
            "Blocks of {block_size} for {tokens} tokens?",
            "Count the blocks for {tokens} tokens, block size {block_size}.",
            "With block_size {block_size}, how many blocks hold {tokens} tokens?",
            "A prompt has {tokens} tokens and a block holds {block_size}. How many blocks does it take?",
            "{tokens} tokens in blocks of {block_size}: how many blocks?",
            "There are {tokens} tokens, and the block size is {block_size}. Count the blocks.",
        ),
    },
    "zh": {
        "lookup_term": (
            "查一下{term}。",
            "在术语表里查{term}。",
            "术语表怎么解释{term}？",
            "请在术语表中查找{term}。",
            "帮我查{term}这个术语。",
            "查术语表：{term}",
            "我要查一个术语：{term}。",
            "查一查{term}。",
            "请查阅术语表：{term}",
            "术语表里的{term}是怎么写的？",
        ),
        "kv_cache_size": (
            "{layers} 层、{kv_heads} 个 KV 头、head_dim 为 {head_dim}，{tokens} 个词元的 KV 缓存有多大？",
            "算一下 KV 缓存：{layers} 层，{kv_heads} 个 KV 头，head_dim {head_dim}，{tokens} 个词元。",
            "{tokens} 个词元的 KV 缓存占多少字节？模型有 {layers} 层、{kv_heads} 个 KV 头，head_dim 是 {head_dim}。",
            "KV 头有 {kv_heads} 个，每个 {head_dim} 维，共 {layers} 层，{tokens} 个词元要多少字节的 KV 缓存？",
            "请计算 KV 缓存大小：{tokens} 个词元，{layers} 层，{kv_heads} 个 KV 头，head_dim {head_dim}。",
            "模型有 {layers} 层，KV 头 {kv_heads} 个，head_dim {head_dim}，缓存 {tokens} 个词元要多少字节？",
            "{layers} 层、head_dim {head_dim}、{kv_heads} 个 KV 头的模型，{tokens} 个词元的 KV 缓存是多少字节？",
        ),
        "count_blocks": (
            "块大小为 {block_size} 时，{tokens} 个词元需要几个块？",
            "{tokens} 个词元，每块 {block_size} 个，要几个块？",
            "算一下块数：{tokens} 个词元，块大小 {block_size}。",
            "每块放 {block_size} 个词元，{tokens} 个词元占多少块？",
            "提示有 {tokens} 个词元，block_size 是 {block_size}，需要多少块？",
        ),
    },
}

HELDOUT: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "lookup_term": ("Consult the glossary about {term}.", "Let us look up {term} together."),
        "kv_cache_size": (
            "What is the size of the KV cache for {tokens} tokens given {layers} layers, {kv_heads} KV heads, "
            "head_dim {head_dim}?",
        ),
        "count_blocks": ("I have {tokens} tokens and a block size of {block_size}; tell me the number of blocks.",),
    },
    "zh": {
        "lookup_term": ("我想查{term}。", "翻翻术语表，看看{term}。"),
        "kv_cache_size": (
            "有 {layers} 层、{kv_heads} 个 KV 头、head_dim {head_dim} 时，{tokens} 个词元用多大的 KV 缓存？",
        ),
        "count_blocks": ("{tokens} 个词元，块大小是 {block_size}，共需多少块？",),
    },
}
"""Kept out of training, for the exam."""

ANSWERS: dict[Language, dict[str, str]] = {
    "en": {
        "kv_cache_size": "It takes {result} bytes.",
        "count_blocks": "It takes {result} blocks.",
    },
    "zh": {"kv_cache_size": "需要 {result} 字节。", "count_blocks": "需要 {result} 个块。"},
}
UNKNOWN_ANSWERS: dict[Language, str] = {"en": "The glossary does not have this term.", "zh": "术语表里没有这个词。"}
UNKNOWN_TERMS = 0.03

NUMBERS: dict[str, Callable[[random.Random], int]] = {
    "layers": lambda rng: rng.randint(1, 96),
    "kv_heads": lambda rng: rng.choice([1, 2, 3, 4, 5, 8, 10, 12, 16, 32]),
    "head_dim": lambda rng: rng.choice([32, 48, 64, 80, 96, 112, 128, 160, 192, 256]),
    "tokens": lambda rng: rng.choice([rng.randint(1, 999), rng.randint(1, 99_999), 2 ** rng.randint(5, 17)]),
    "block_size": lambda rng: rng.choice([4, 8, 16, 32, 64, 128, rng.randint(2, 256)]),
}


@dataclass(frozen=True)
class Call:
    """A question that needs a call, the call, its result, and the answer.

    Attributes:
        written: the call as the tutor is to write it.
    """

    question: str
    name: str
    arguments: dict[str, Any]
    result: str
    answer: str

    @property
    def written(self) -> str:
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return f'<tool_call>\n{{"name": "{self.name}", "arguments": {arguments}}}\n</tool_call>'


def draw_call(rng: random.Random, language: Language, glossary: Glossary) -> Call:
    """A random one, as people type it."""
    name = rng.choices(list(PARAMETERS), [4, 2, 1])[0]  # terms are many, and each has names to be learnt
    template = rng.choice(TRAIN[language][name])
    return _call(rng, language, glossary, name, template, lambda question: as_typed(rng, question, language))


def heldout_calls(glossary: Glossary, language: Language, per_template: int = 60) -> list[Call]:
    """Every held-out template with so many random arguments, the same every time."""
    rng = random.Random(19)
    return [
        _call(rng, language, glossary, name, template, str)
        for name, templates in HELDOUT[language].items()
        for template in templates
        for _ in range(per_template)
    ]


def _call(
    rng: random.Random,
    language: Language,
    glossary: Glossary,
    name: str,
    template: str,
    typed: Callable[[str], str],
) -> Call:
    arguments: dict[str, Any]
    if name == "lookup_term":
        known = rng.random() >= UNKNOWN_TERMS
        entry = rng.choice(glossary.terms).entry(language)
        asked = rng.choice(entry.names) if known else unknown_word(rng, language)
        arguments = {"term": entry.term if known else asked}
        result = lookup_term(glossary, language, **arguments)
        answer = result if known else UNKNOWN_ANSWERS[language]
        question = typed(fill(template, language, term=asked))
    else:
        arguments = {parameter: NUMBERS[parameter](rng) for parameter in PARAMETERS[name]}
        result = str({"kv_cache_size": kv_cache_size, "count_blocks": count_blocks}[name](**arguments))
        answer = ANSWERS[language][name].format(result=result)
        question = typed(fill(template, language, **{key: str(value) for key, value in arguments.items()}))
    return Call(question, name, arguments, result, answer)
