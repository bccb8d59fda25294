HINT = {"en": "let go", "zh": "放开"}

from mini_infer.memory import BlockManager
from mini_infer.scheduler import BlockCopy
from mini_infer.typing import BlockTable


def prepare_slots(
    block_table: BlockTable, num_computed_tokens: int, num_new_tokens: int, manager: BlockManager
) -> tuple[list[int], list[BlockCopy]]:
    size = manager.block_size
    end = num_computed_tokens + num_new_tokens
    copies = []
    for place in range(num_computed_tokens // size, manager.blocks_for(end)):
        if place == len(block_table):
            block_table += manager.allocate(1)
        elif manager.is_shared(block_table[place]):
            old, (new,) = block_table[place], manager.allocate(1)
            copies.append(BlockCopy(old, new))
            block_table[place] = new
    slots = [block_table[p // size] * size + p % size for p in range(num_computed_tokens, end)]
    return slots, copies
