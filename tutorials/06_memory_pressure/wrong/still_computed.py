HINT = {"en": "counts tokens as computed", "zh": "算作已计算"}


def make_room(sequence, running, waiting, blocks):
    if sequence.num_computed_tokens // blocks.block_size < len(sequence.block_table):
        return True
    while not blocks.can_allocate(1):
        victim = running.pop()
        blocks.free(victim.block_table)
        victim.block_table = []
        waiting.appendleft(victim)
        if victim is sequence:
            return False
    sequence.block_table += blocks.allocate(1)
    return True
