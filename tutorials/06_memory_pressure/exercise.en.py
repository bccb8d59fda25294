"""Chapter 6: a sequence needs one more block. Make room for it.

Fill in the body of ``make_room``. The scheduler calls it once in every step for each sequence that decodes, in order
of arrival, before anything is computed.
"""

from collections import deque

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Sequence


def make_room(sequence: Sequence, running: list[Sequence], waiting: deque[Sequence], blocks: BlockManager) -> bool:
    """See to it that a decoding sequence has a slot for the token that it computes in this step.

    That token is the first whose keys and values are not computed yet: its place in the sequence is
    ``sequence.num_computed_tokens``. If ``sequence.block_table`` reaches that far, there is nothing to do. Otherwise
    append one new block to it (``blocks.can_allocate``, ``blocks.allocate``).

    As long as there is no block to be had, preempt the running sequence that arrived last, which may be ``sequence``
    itself. A preempted sequence leaves ``running`` and gives its blocks back (``blocks.free``); its block table is
    empty and none of its tokens counts as computed; it waits, before everybody who waits already. Blocks may be
    shared: giving one back does not always make it free, so one victim may not be enough.

    Args:
        sequence: one of ``running``; all its tokens but the last are computed.
        running: in order of arrival.
        waiting: in order of arrival; all of them arrived after those that run.
        blocks: the pool.

    Returns:
        Whether the sequence has its slot; False if it was preempted itself.
    """
    ...
