"""The prefix cache: which block holds the keys and values of which tokens after which others.

Keys and values of a block depend on its tokens and on all tokens before them. So a full block is known by its own
tokens and by the identity of the block before it, and that one in the same way: a chain back to the first block. The
identity is a number given out once and never again, not a hash. Python's dict hashes the (parent, tokens) pair and
compares it in full before it answers, so two prompts whose hashes collide can never be taken for each other.
"""

from collections.abc import Sequence
from itertools import count
from typing import TypeAlias

ContentId: TypeAlias = int
"""Stands for one block's tokens after one certain prefix."""

Root: TypeAlias = str | None
"""Where a chain starts: the request's ``cache_salt``. Chains with different salts never meet."""

_Key: TypeAlias = tuple[Root | ContentId, tuple[int, ...]]


class PrefixCache:
    """A dictionary from (prefix, tokens) to the block that holds them.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[_Key, tuple[int, ContentId]] = {}
        self._keys: dict[int, _Key] = {}
        self._ids = count()

    def __contains__(self, block: int) -> bool:
        """Whether the block's content is known."""
        return block in self._keys

    @property
    def blocks(self) -> list[int]:
        """All whose content is known."""
        return list(self._keys)

    def walk(self, token_ids: Sequence[int], root: Root, num_blocks: int) -> list[tuple[int, ContentId]]:
        """Follow the chain from its root as far as it is known, at most ``num_blocks`` blocks."""
        found: list[tuple[int, ContentId]] = []
        parent: Root | ContentId = root
        for start in range(0, num_blocks * self._block_size, self._block_size):
            entry = self._blocks.get((parent, tuple(token_ids[start : start + self._block_size])))
            if entry is None:
                break
            found.append(entry)
            parent = entry[1]
        return found

    def add(self, block: int, parent: Root | ContentId, token_ids: tuple[int, ...]) -> tuple[ContentId, bool]:
        """Record that ``block`` holds these tokens; if another does already, that one stays.

        Returns:
            The content's id, and whether ``block`` was recorded.
        """
        key = (parent, token_ids)
        known = self._blocks.get(key)
        if known is not None:
            return known[1], False
        content_id = next(self._ids)
        self._blocks[key] = (block, content_id)
        self._keys[block] = key
        return content_id, True

    def remove(self, block: int) -> None:
        """The block no longer holds what it did. Blocks that continue it can not be found any more, and age away."""
        del self._blocks[self._keys.pop(block)]
