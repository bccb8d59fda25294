"""What each caller may have while others want something, too: of the seats, of the blocks, and of a step.

A caller is whoever the requests come from: a connection, a key. Sequences that nobody is named for are one caller's.
With little to do nothing here changes anything; with one caller, steps only get no longer than somebody who comes next
would wait for.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable
from collections.abc import Sequence as Seq

from mini_infer.scheduler.sequence import Sequence

RESERVED = 8
"""One seat in so many is for callers who have none, so that they need not wait for somebody else's sequences to end."""

_PROMPT_TOKENS, _PROMPT_TOKENS_BESIDE = 16, 4
"""Tokens of one caller's prompts in a step, for each sequence of its fair size: alone, and beside others."""

_DECODES = 8
"""Sequences that a step decodes for a caller who is alone, for each of its fair size. More at once would hardly be
faster, and the next to come waits for a step as long as that."""


def seats_for_one(max_num_seqs: int) -> int:
    """Seats that one caller's sequences may take."""
    return max_num_seqs - max_num_seqs // RESERVED


def crowding_callers(running: Iterable[Sequence], num_taken: int, max_num_seqs: int) -> Collection[Hashable]:
    """Whose waiting sequences get no seat now: what is left is for those who have none."""
    if num_taken < seats_for_one(max_num_seqs):
        return ()
    return {sequence.caller for sequence in running if sequence.caller is not None}


def overdrawn_callers(running: Seq[Sequence], num_blocks: int, block_size: int, num_more: int = 0) -> set[Hashable]:
    """Whose sequences, if they are several, need more than an equal share of all blocks: when there are too few, it is
    theirs that give some back.

    Args:
        running: those that hold blocks.
        num_blocks: how many there are.
        num_more: callers who hold none and are to have some.
    """
    num_callers = len({sequence.caller for sequence in running})
    if num_callers + num_more < 2 or num_callers == len(running):
        return set()
    needs: defaultdict[Hashable, list[int]] = defaultdict(list)
    for sequence in running:
        needs[sequence.caller].append(-(-sequence.num_slots // block_size))
    share = num_blocks // (len(needs) + num_more)
    return {caller for caller, blocks in needs.items() if len(blocks) > 1 and sum(blocks) > share}


class StepShares:
    """Max-min fair shares of a step's decodes (Bertsekas and Gallager, "Data Networks", 1992, section 6.5.2).

    A step of many sequences takes longer than one of few, and whoever is in it waits for all of them. So once a step
    has more than ``fair_size`` sequences ready, callers with few keep their pace, and those with many take turns among
    their own. So do, beyond eight times that, those of a caller who is alone and whose name is known.

    Args:
        fair_size: sequences that a step may decode without making anybody wait noticeably.
    """

    def __init__(self, fair_size: int) -> None:
        self._fair_size = fair_size
        self._num_turns = 0
        self._last_turns: dict[Sequence, int] = {}  # which of all turns was each one's last

    def prompt_tokens(self, num_callers: int) -> int:
        """How many tokens of prompts a step may compute for one caller whose name is known. Also one who is alone gets
        no step that would make the next who comes wait for long; that takes no longer in all."""
        return (_PROMPT_TOKENS if num_callers == 1 else _PROMPT_TOKENS_BESIDE) * self._fair_size

    def choose(self, ready: list[Sequence], waiting_callers: Collection[Hashable]) -> list[Sequence]:
        """Those of the ready sequences whose turn it is, in the order in which they came."""
        if len(ready) <= self._fair_size:
            return ready
        demands = Counter([sequence.caller for sequence in ready])
        others = [caller for caller in waiting_callers if caller not in demands]
        is_alone = len(demands) + len(others) == 1
        if is_alone and None in demands:
            return ready
        size = _DECODES * self._fair_size if is_alone else self._fair_size
        share = fair_share([*demands.values(), *(1 for _ in others)], size)
        if share >= max(demands.values()):
            return ready
        by_caller: defaultdict[Hashable, list[Sequence]] = defaultdict(list)
        for sequence in ready:
            by_caller[sequence.caller].append(sequence)
        last = {sequence: self._last_turns.get(sequence, 0) for sequence in ready}
        chosen: set[Sequence] = set()
        for sequences in by_caller.values():
            sequences.sort(key=last.__getitem__)
            for sequence in sequences[:share]:
                self._num_turns += 1
                last[sequence] = self._num_turns
            chosen.update(sequences[:share])
        self._last_turns = last
        return [sequence for sequence in ready if sequence in chosen]


def fair_share(demands: Seq[int], size: int) -> int:
    """The most that each may have so that all together have ``size``, where those who want less leave it to others; at
    least 1."""
    left = size
    for place, demand in enumerate(sorted(demands)):
        equal = left // (len(demands) - place)
        if demand > equal:
            return max(equal, 1)
        left -= demand
    return max(demands)
