HINT = {"en": "not all of its blocks came back", "zh": "没有全部还给池子"}


def make_room(sequence, running, waiting, blocks):
    if sequence.num_computed_tokens // blocks.block_size < len(sequence.block_table):
        return True
    while not blocks.can_allocate(1):
        victim = running.pop()
        victim.block_table.clear()
        blocks.free(victim.block_table)
        victim.num_computed_tokens = 0
        waiting.appendleft(victim)
        if victim is sequence:
            return False
    sequence.block_table += blocks.allocate(1)
    return True
