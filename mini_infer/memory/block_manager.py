"""The block manager: hands out KV blocks, shares them, takes them back, and never loses or doubles one.

It knows integers only. A block is ``block_size`` tokens' keys and values in every layer; the tensors live elsewhere.
A block of the GPU pool is in one of three states:

    free    nobody uses it and its content means nothing
    used    one or more sequences hold it (its reference count says how many)
    cached  nobody holds it, but the prefix cache knows its content; it is given away last, least recently used first
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mini_infer.exceptions import MiniInferError, OutOfMemoryError
from mini_infer.fields import check_int
from mini_infer.memory.prefix_cache import ContentId, PrefixCache, Root


class BlockError(MiniInferError, ValueError):
    """Blocks were freed that are not allocated, or asked for in an impossible number."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached beginning of some tokens.

    Attributes:
        blocks: full blocks that hold it, in order.
        content_ids: their places in the prefix cache.
        num_unused: how many of the blocks nobody holds; sharing them takes as many from what can be allocated.
    """

    blocks: list[int]
    content_ids: list[ContentId]
    num_unused: int


class BlockManager:
    """Owns the ids of two pools of KV blocks, on the GPU (the model's device, whatever that is) and in CPU memory.

    Args:
        block_size: tokens per block.
        num_gpu_blocks: blocks on the model's device.
        num_cpu_blocks: blocks in CPU memory, for swapped sequences.

    Raises:
        BlockError: a size is not a positive integer (``num_cpu_blocks`` may be 0).
    """

    def __init__(self, block_size: int, num_gpu_blocks: int, num_cpu_blocks: int = 0) -> None:
        check_int(BlockError, "block_size", block_size, 1)
        check_int(BlockError, "num_gpu_blocks", num_gpu_blocks, 1)
        check_int(BlockError, "num_cpu_blocks", num_cpu_blocks, 0)
        self.block_size = block_size
        self.num_gpu_blocks = num_gpu_blocks
        self.num_cpu_blocks = num_cpu_blocks
        self.peak_used_blocks = 0
        self._free = list(range(num_gpu_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest in cache
        self._references = [0] * num_gpu_blocks
        self._prefixes = PrefixCache(block_size)
        self._unused: dict[int, None] = {}  # cached blocks, least recently used first
        self._free_cpu = list(range(num_cpu_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._unused)

    @property
    def cached_blocks(self) -> list[int]:
        """Ids of the cached blocks, least recently used first."""
        return list(self._unused)

    @property
    def num_available_blocks(self) -> int:
        """Blocks that ``allocate`` could hand out now: the free and the cached ones."""
        return len(self._free) + len(self._unused)

    @property
    def num_used_blocks(self) -> int:
        return self.num_gpu_blocks - self.num_available_blocks

    @property
    def num_free_cpu_blocks(self) -> int:
        return len(self._free_cpu)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    # ---- the GPU pool --------------------------------------------------------------------------------------------

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether ``allocate(num_blocks)`` would succeed now."""
        check_int(BlockError, "num_blocks", num_blocks, 0)
        return num_blocks <= self.num_available_blocks

    def allocate(self, num_blocks: int) -> list[int]:
        """Take ``num_blocks`` blocks: free ones first, then the cached ones that were used longest ago.

        Raises:
            OutOfMemoryError: there are not as many; nothing is taken then.
        """
        if not self.can_allocate(num_blocks):
            raise OutOfMemoryError(
                f"asked for {num_blocks} blocks but {self.num_available_blocks} of {self.num_gpu_blocks} are free; "
                "ask can_allocate first, or free some"
            )
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._references[block] = 1
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used_blocks)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of blocks. One that nobody else holds becomes free, or cached if its content is known.

        Raises:
            BlockError: one of them is not allocated, unknown, or named twice; none is freed then.
        """
        seen: set[int] = set()
        for block in blocks:
            check_int(BlockError, "block id", block, 0, self.num_gpu_blocks - 1)
            if not self._references[block] or block in seen:
                raise BlockError(f"block {block} is freed twice or was never allocated (freeing {list(blocks)})")
            seen.add(block)
        for block in reversed(blocks):  # the end of a prefix is worth less than its beginning, so it is evicted first
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._prefixes:
                    self._unused[block] = None
                else:
                    self._free.append(block)

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks that others hold, or that are cached."""
        for block in blocks:
            self._unused.pop(block, None)
            self._references[block] += 1
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used_blocks)

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds the block, so that none of them may write to it."""
        return self._references[block] > 1

    def _evict(self) -> int:
        block = next(iter(self._unused))
        del self._unused[block]
        self._prefixes.remove(block)
        return block

    # ---- the prefix cache ----------------------------------------------------------------------------------------

    def match_prefix(self, token_ids: Sequence[int], root: Root, num_blocks: int) -> PrefixMatch:
        """The longest cached beginning of ``token_ids``, at most ``num_blocks`` full blocks. Takes nothing yet."""
        found = self._prefixes.walk(token_ids, root, num_blocks)
        blocks = [block for block, _ in found]
        return PrefixMatch(
            blocks, [content_id for _, content_id in found], sum(block in self._unused for block in blocks)
        )

    def remember(self, block: int, parent: Root | ContentId, token_ids: Sequence[int]) -> tuple[ContentId, bool]:
        """Make a full block's content known, so that others may share it.

        Args:
            parent: content id of the block before it, or the root for the first one.
            token_ids: its ``block_size`` tokens.

        Returns:
            The content's id, and whether this block is the one that now stands for it; another may already.
        """
        return self._prefixes.add(block, parent, tuple(token_ids))

    def forget(self, block: int) -> None:
        """Take back ``remember``: the block's content never came to be. It may have been evicted since."""
        if block not in self._prefixes:
            return
        self._prefixes.remove(block)
        if self._unused.pop(block, 0) is None:
            self._free.append(block)

    def forget_all(self) -> None:
        """No block's content is what it was."""
        for block in self._prefixes.blocks:
            self.forget(block)

    # ---- the CPU pool --------------------------------------------------------------------------------------------

    def allocate_cpu(self, num_blocks: int) -> list[int] | None:
        """Take ``num_blocks`` blocks of CPU memory; None if there are not as many."""
        if num_blocks > len(self._free_cpu):
            return None
        return [self._free_cpu.pop() for _ in range(num_blocks)]

    def free_cpu(self, blocks: Sequence[int]) -> None:
        """Give blocks of CPU memory back.

        Raises:
            BlockError: one of them is unknown or already free; none is freed then.
        """
        free = set(self._free_cpu)
        for block in blocks:
            check_int(BlockError, "CPU block id", block, 0, self.num_cpu_blocks - 1)
            if block in free:
                raise BlockError(f"CPU block {block} is freed twice or was never allocated (freeing {list(blocks)})")
            free.add(block)
        self._free_cpu += blocks
