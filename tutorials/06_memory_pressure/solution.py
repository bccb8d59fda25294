from collections import deque

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Sequence


def make_room(sequence: Sequence, running: list[Sequence], waiting: deque[Sequence], blocks: BlockManager) -> bool:
    if sequence.num_computed_tokens // blocks.block_size < len(sequence.block_table):
        return True
    while not blocks.can_allocate(1):
        victim = running.pop()
        blocks.free(victim.block_table)
        victim.block_table = []
        victim.num_computed_tokens = 0
        waiting.appendleft(victim)
        if victim is sequence:
            return False
    sequence.block_table += blocks.allocate(1)
    return True
