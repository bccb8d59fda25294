"""Chapter 3: give a sequence the slots for its new tokens.

Fill in the body of ``prepare_slots``. ``mini-infer learn check 3`` grades it.
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
    """
    ...
