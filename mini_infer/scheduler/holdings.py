"""Which blocks a sequence holds: taking them, sharing them, copying them away, giving them back.

Whose turn it is the scheduler decides; here it is settled what that takes of the block manager.
"""

from mini_infer.memory import BlockManager
from mini_infer.scheduler.plan import BlockCopy, PlanDraft
from mini_infer.scheduler.sequence import Sequence, SequenceStatus


class Holdings:
    """The blocks of all sequences. Whatever has to be copied is put into the plan that is being made.

    Args:
        manager: whose blocks they are.
    """

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager

    def take(self, sequence: Sequence, reads_prefix: bool, spare: int, draft: PlanDraft) -> int | None:
        """Give a waiting sequence blocks for all its tokens, if that leaves ``spare`` ones; None if not.

        What the prefix cache has is shared, what was swapped out comes back; up to the first gap nothing is computed.

        Returns:
            How many tokens were found in the prefix cache.
        """
        manager, size = self._manager, self._manager.block_size
        if sequence.twin is not None:
            num_blocks = manager.blocks_for(sequence.num_slots)
            if manager.num_available_blocks < 2 * num_blocks + spare:
                return None
            sequence.twin.block_table = manager.allocate(num_blocks)
            sequence.twin.status = SequenceStatus.RUNNING
        # The last token is always computed: its logits are wanted.
        most = (len(sequence) - 1) // size if reads_prefix else 0
        match = manager.match_prefix(sequence.token_ids, sequence.cache_salt, most)
        num_new_blocks = manager.blocks_for(sequence.num_slots) - len(match.blocks)
        if manager.num_available_blocks < num_new_blocks + match.num_unused + spare:
            return None
        manager.share(match.blocks)
        sequence.block_table = match.blocks + manager.allocate(num_new_blocks)
        sequence.content_ids = match.content_ids
        sequence.num_computed_tokens = len(match.blocks) * size
        for place in range(len(match.blocks), manager.blocks_for(sequence.num_swapped_tokens)):
            cpu_block = sequence.swapped_blocks[place]
            if cpu_block is None:
                break
            draft.swap_in.append(BlockCopy(cpu_block, sequence.block_table[place]))
            arrived = min((place + 1) * size, sequence.num_swapped_tokens)
            sequence.num_computed_tokens = max(sequence.num_computed_tokens, arrived)
        self.drop_swapped(sequence)
        return len(match.blocks) * size

    def share(self, parent: Sequence, child: Sequence) -> None:
        """Let a child begin on the blocks that its parent has computed."""
        child.block_table = parent.block_table[: self._manager.blocks_for(parent.num_computed_tokens)]
        self._manager.share(child.block_table)
        child.content_ids = list(parent.content_ids)

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks that a sequence's tokens do not need."""
        num_needed = self._manager.blocks_for(len(sequence))
        self._manager.free(sequence.block_table[num_needed:])
        del sequence.block_table[num_needed:]

    def remember(self, sequence: Sequence, num_tokens: int, draft: PlanDraft) -> None:
        """Let others share the full blocks that hold the first ``num_tokens`` tokens once this step is computed.

        They may do so in this very step: in each layer all keys are written before any is read.
        """
        size = self._manager.block_size
        for place in range(len(sequence.content_ids), num_tokens // size):
            parent = sequence.content_ids[-1] if sequence.content_ids else sequence.cache_salt
            tokens = sequence.token_ids[place * size : (place + 1) * size]
            block = sequence.block_table[place]
            content_id, is_new = self._manager.remember(block, parent, tokens)
            sequence.content_ids.append(content_id)
            if is_new:
                draft.remembered.append(block)

    def find_missing(self, sequence: Sequence) -> tuple[list[int], int]:
        """What a sequence lacks to write all its tokens: own copies of blocks that others hold too, by their places in
        its table, and so many more blocks."""
        manager, table = self._manager, sequence.block_table
        first = sequence.num_computed_tokens // manager.block_size
        needed = manager.blocks_for(sequence.num_slots)
        shared = [place for place in range(first, min(needed, len(table))) if manager.is_shared(table[place])]
        return shared, max(0, needed - len(table))

    def grow(self, sequence: Sequence, draft: PlanDraft) -> bool:
        """Give a sequence the blocks that it lacks. False, and nothing has changed, if there are not enough."""
        manager, table = self._manager, sequence.block_table
        computed = sequence.num_computed_tokens
        if len(sequence.token_ids) - computed == 1:  # the common case, and the hot one
            place = computed // manager.block_size
            if place < len(table) and not manager.is_shared(table[place]):
                return True
        shared, num_more = self.find_missing(sequence)
        if not shared and not num_more:
            return True
        if not manager.can_allocate(len(shared) + num_more):
            return False
        blocks = manager.allocate(len(shared) + num_more)
        for place in shared:
            block = blocks.pop()
            draft.copy.append(BlockCopy(table[place], block))
            manager.free([table[place]])
            table[place] = block
        table += blocks
        return True

    def num_swapped(self, sequence: Sequence) -> int:
        """How many blocks ``swap_out`` would copy."""
        return self._stays(sequence).count(False)

    def swap_out(self, sequence: Sequence, draft: PlanDraft) -> bool:
        """Plan to copy a sequence's blocks to CPU memory; False if there is no room.

        A block that the prefix cache knows and others hold is left where it is: it will be found again.
        """
        stays = self._stays(sequence)
        cpu_blocks = self._manager.allocate_cpu(stays.count(False))
        if cpu_blocks is None:
            return False
        targets = iter(cpu_blocks)
        sequence.swapped_blocks = [None if stay else next(targets) for stay in stays]
        sequence.num_swapped_tokens = sequence.num_computed_tokens
        draft.swap_out.extend(
            BlockCopy(block, cpu_block)
            for block, cpu_block in zip(sequence.block_table, sequence.swapped_blocks, strict=False)
            if cpu_block is not None
        )
        return True

    def _stays(self, sequence: Sequence) -> list[bool]:
        """For each block that holds a computed token, whether it would be found again if it were let go."""
        table = sequence.block_table[: self._manager.blocks_for(sequence.num_computed_tokens)]
        known = len(sequence.content_ids)
        return [place < known and self._manager.is_shared(block) for place, block in enumerate(table)]

    def release(self, sequence: Sequence) -> None:
        if sequence.twin is not None:
            self.release(sequence.twin)
            sequence.twin.status = SequenceStatus.RESTING
        self._manager.free(sequence.block_table)
        sequence.block_table = []
        sequence.content_ids = []
        sequence.num_computed_tokens = 0
        sequence.reuse = None

    def drop_swapped(self, sequence: Sequence) -> None:
        """Free a sequence's CPU blocks. A copy from them that is planned comes before any to them can be."""
        self._manager.free_cpu([block for block in sequence.swapped_blocks if block is not None])
        sequence.swapped_blocks = []
        sequence.num_swapped_tokens = 0
