HINT = {"en": "the block's edge", "zh": "块的边界"}


def make_room(sequence, running, waiting, blocks):
    if len(sequence) // blocks.block_size < len(sequence.block_table):
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
