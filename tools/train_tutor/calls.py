"""Calls of tools: three functions of the tutor's own domain, questions that need them, and some that do not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .glossary import Glossary, Language


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


OFFER = "".join(f"{name}({', '.join(parameters)})\n" for name, parameters in PARAMETERS.items())
"""How the chat template shows them: few tokens, for a model with a short context."""

QUESTIONS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "lookup_term": ("Look up {term}.", "Look {term} up in the glossary.", "What does the glossary say of {term}?"),
        "kv_cache_size": (
            "How large is the KV cache of {tokens} tokens with {layers} layers, {kv_heads} KV heads and head_dim "
            "{head_dim}?",
            "KV cache size: {layers} layers, {kv_heads} KV heads, head_dim {head_dim}, {tokens} tokens.",
        ),
        "count_blocks": (
            "How many blocks do {tokens} tokens need with a block size of {block_size}?",
            "Blocks of {block_size} for {tokens} tokens?",
        ),
    },
    "zh": {
        "lookup_term": ("查一下{term}。", "在术语表里查{term}。", "术语表怎么解释{term}？"),
        "kv_cache_size": (
            "{layers} 层、{kv_heads} 个 KV 头、head_dim 为 {head_dim}，{tokens} 个词元的 KV 缓存有多大？",
            "算一下 KV 缓存：{layers} 层，{kv_heads} 个 KV 头，head_dim {head_dim}，{tokens} 个词元。",
        ),
        "count_blocks": (
            "块大小为 {block_size} 时，{tokens} 个词元需要几个块？",
            "{tokens} 个词元，每块 {block_size} 个，要几个块？",
        ),
    },
}

ANSWERS: dict[Language, dict[str, str]] = {
    "en": {
        "lookup_term": "{result}",
        "kv_cache_size": "It takes {result} bytes.",
        "count_blocks": "It takes {result} blocks.",
    },
    "zh": {"lookup_term": "{result}", "kv_cache_size": "需要 {result} 字节。", "count_blocks": "需要 {result} 个块。"},
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
    """A random one."""
    name = rng.choice(list(PARAMETERS))
    arguments: dict[str, Any]
    if name == "lookup_term":
        arguments = {"term": rng.choice(glossary.terms).entry(language).term}
        result = lookup_term(glossary, language, **arguments)
    else:
        choices: dict[str, Callable[[], int]] = {
            "layers": lambda: rng.choice([4, 6, 12, 16, 24, 28, 32]),
            "kv_heads": lambda: rng.choice([1, 2, 4, 8]),
            "head_dim": lambda: rng.choice([32, 64, 128]),
            "tokens": lambda: rng.choice([rng.randint(1, 300), 2 ** rng.randint(5, 13)]),
            "block_size": lambda: rng.choice([8, 16, 32]),
        }
        arguments = {parameter: choices[parameter]() for parameter in PARAMETERS[name]}
        result = str({"kv_cache_size": kv_cache_size, "count_blocks": count_blocks}[name](**arguments))
    question = rng.choice(QUESTIONS[language][name]).format(**arguments)
    return Call(question, name, arguments, result, ANSWERS[language][name].format(result=result))
