"""The block manager: hands out KV blocks, takes them back, and never loses or doubles one.

It knows integers only. A block is ``block_size`` tokens' keys and values in every layer; the tensors live elsewhere.
"""

from collections.abc import Sequence

from mini_infer.exceptions import MiniInferError, OutOfMemoryError
from mini_infer.fields import check_int


class BlockError(MiniInferError, ValueError):
    """Blocks were freed that are not allocated, or asked for in an impossible number."""


class BlockManager:
    """Owns the ids of a pool of KV blocks.

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
        self._used = bytearray(num_gpu_blocks)  # 1 where a block is allocated, so that a double free is noticed

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_gpu_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether ``allocate(num_blocks)`` would succeed now."""
        check_int(BlockError, "num_blocks", num_blocks, 0)
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take ``num_blocks`` free blocks.

        Raises:
            OutOfMemoryError: fewer are free; nothing is taken then.
        """
        if not self.can_allocate(num_blocks):
            raise OutOfMemoryError(
                f"asked for {num_blocks} blocks but {len(self._free)} of {self.num_gpu_blocks} are free; "
                "ask can_allocate first, or free some"
            )
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._used[block] = 1
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used_blocks)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back.

        Raises:
            BlockError: one of them is not allocated, unknown, or named twice; none is freed then.
        """
        seen: set[int] = set()
        for block in blocks:
            check_int(BlockError, "block id", block, 0, self.num_gpu_blocks - 1)
            if not self._used[block] or block in seen:
                raise BlockError(f"block {block} is freed twice or was never allocated (freeing {list(blocks)})")
            seen.add(block)
        for block in reversed(blocks):
            self._used[block] = 0
            self._free.append(block)
