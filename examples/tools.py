"""Three tools of the tutor's own trade: ``mini-infer chat --tools examples/tools.py``, and ask it to look up a term."""

from pathlib import Path

import yaml

_GLOSSARY = Path(__file__).parents[1] / "tools" / "train_tutor" / "glossary.yaml"


def _answers() -> dict[str, str]:
    """What the glossary says, by every name of every term."""
    groups = yaml.safe_load(_GLOSSARY.read_text(encoding="utf-8"))["groups"]
    entries = [term[language] for language in ("zh", "en") for group in groups for term in group["terms"]]
    return {name.lower(): entry["answer"] for entry in entries for name in (entry["term"], *entry.get("aliases", ()))}


def lookup_term(term: str) -> str:
    """What the glossary says of a term.

    Args:
        term: its name, in English or Chinese.
    """
    return _answers().get(term.lower(), "unknown term")


def kv_cache_size(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Bytes of keys and values in bfloat16.

    Args:
        layers: of the model.
        kv_heads: heads of keys and values in each layer.
        head_dim: numbers in each head.
        tokens: in the cache.
    """
    return 2 * 2 * layers * kv_heads * head_dim * tokens


def count_blocks(tokens: int, block_size: int) -> int:
    """Blocks of the KV cache that so many tokens need.

    Args:
        tokens: to be stored.
        block_size: tokens of each block.
    """
    return -(-tokens // block_size)
