"""Chapter 3: give a sequence the slots for its new tokens.

Fill in the body of ``prepare_slots``. ``mini-infer learn check 3`` grades it.
---
第 3 章：为序列的新词元准备槽位。

请补全 ``prepare_slots`` 的函数体，然后用 ``mini-infer learn check 3`` 批改。
"""

from mini_infer.memory import BlockManager
from mini_infer.scheduler import BlockCopy
from mini_infer.typing import BlockTable


def prepare_slots(
    block_table: BlockTable, num_computed_tokens: int, num_new_tokens: int, manager: BlockManager
) -> tuple[list[int], list[BlockCopy]]:
    """Make room for a sequence's next tokens, and say where each of them goes.

    A token at position p lives in the block ``block_table[p // block_size]``, at offset ``p % block_size``; its slot is
    ``block_id * block_size + offset``. Before it may be written, that block must exist and must belong to this sequence
    alone:

    - where the table ends too early, append a block from ``manager.allocate(1)``, which returns a list with one id;
    - where the block is shared (``manager.is_shared(block)``), take a new one in its place, note
      ``BlockCopy(old, new)``, and let go of the old one with ``manager.free([old])``.

    Blocks that none of the new tokens goes into stay as they are, shared or not. Take no block more than needed.

    Args:
        block_table: the sequence's blocks so far, changed in place; they hold the computed tokens at least.
        num_computed_tokens: how many tokens have their keys and values in the cache: positions 0 and on.
        num_new_tokens: how many come now, at the positions after those; at least 1.
        manager: owns the blocks, and has enough of them. ``manager.block_size`` is the number of slots in a block.

    Returns:
        The slots of the new tokens, in order, and the copies that must be made before they are written.
    ---
    为序列接下来的词元腾出位置，并说明每个词元放在哪里。

    位置 p 的词元放在块 ``block_table[p // block_size]`` 里，块内偏移为 ``p % block_size``，
    槽位编号是 ``块号 * block_size + 偏移``。写入之前，这个块必须存在，而且只归这一个序列所有：

    - 块表不够长，就追加一个块：``manager.allocate(1)`` 返回只含一个块号的列表；
    - 块被共享（``manager.is_shared(block)``），就换一个新块顶替它的位置，记下 ``BlockCopy(旧块, 新块)``，
      再用 ``manager.free([旧块])`` 放开旧块。

    没有新词元写入的块，不管是否共享，都不要动。一个块也不要多拿。

    参数：
        block_table: 序列现有的块，就地修改；至少装得下已经算好的词元。
        num_computed_tokens: 键和值已在缓存里的词元数，它们占据从 0 开始的位置。
        num_new_tokens: 这一次新来的词元数，位置紧接其后；至少为 1。
        manager: 块的主人，手里的块够用。``manager.block_size`` 是一个块的槽位数。

    返回：
        新词元的槽位，按顺序排列；以及写入之前必须完成的块复制。
    """
    # hole
    size = manager.block_size
    end = num_computed_tokens + num_new_tokens
    copies = []
    for place in range(num_computed_tokens // size, manager.blocks_for(end)):
        if place == len(block_table):
            block_table += manager.allocate(1)
        elif manager.is_shared(block_table[place]):
            old, (new,) = block_table[place], manager.allocate(1)
            copies.append(BlockCopy(old, new))
            manager.free([old])
            block_table[place] = new
    slots = [block_table[p // size] * size + p % size for p in range(num_computed_tokens, end)]
    return slots, copies
    # end
