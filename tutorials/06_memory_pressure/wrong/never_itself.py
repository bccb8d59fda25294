HINT = {"en": "gives way", "zh": "让路的就是 B"}


def make_room(sequence, running, waiting, blocks):
    if sequence.num_computed_tokens // blocks.block_size < len(sequence.block_table):
        return True
    while not blocks.can_allocate(1):
        victim = [other for other in running if other is not sequence][-1]
        running.remove(victim)
        blocks.free(victim.block_table)
        victim.block_table = []
        victim.num_computed_tokens = 0
        waiting.appendleft(victim)
    sequence.block_table += blocks.allocate(1)
    return True
