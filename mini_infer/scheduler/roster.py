"""Who waits, who runs, who rests, who has ended; and what it takes to get from one to another.

When that is to happen the scheduler decides.
"""

from bisect import insort
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from itertools import count

from mini_infer.config import PreemptionMode
from mini_infer.memory import BlockManager
from mini_infer.outputs import FinishReason
from mini_infer.scheduler.holdings import Holdings
from mini_infer.scheduler.plan import PlanDraft, SchedulerOutputs
from mini_infer.scheduler.preemption import PreemptionCosts
from mini_infer.scheduler.queue import WaitingQueue
from mini_infer.scheduler.sequence import Sequence, SequenceStatus

# Looked up some times for each sequence and step.
WAITING, RUNNING, RESTING, FINISHED = (
    SequenceStatus.WAITING,
    SequenceStatus.RUNNING,
    SequenceStatus.RESTING,
    SequenceStatus.FINISHED,
)


@dataclass(slots=True)
class SchedulerCounts:
    """Totals since the start.

    Attributes:
        num_swap_preemptions, num_recompute_preemptions: by what became of the sequence's KV.
        num_prefix_queries, num_prefix_hits: prompt tokens looked up in the prefix cache, and found there.
    """

    num_swap_preemptions: int = 0
    num_recompute_preemptions: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0


class Roster:
    """All sequences of a scheduler, with the seats and blocks that running takes.

    Args:
        max_num_seqs: seats.
        block_manager: whose blocks to hand out.
        num_spare_blocks: what admitting a sequence must leave available, unless nobody runs.
        prefix_caching: share full blocks between sequences that begin alike.
        preemption_mode: "swap", "recompute", or "auto" by ``costs``.
    """

    def __init__(
        self,
        max_num_seqs: int,
        block_manager: BlockManager,
        num_spare_blocks: int,
        prefix_caching: bool,
        preemption_mode: PreemptionMode,
        costs: PreemptionCosts | None,
    ) -> None:
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # sorted: the last one is preempted first
        self.counts = SchedulerCounts()
        self.max_num_seqs = max_num_seqs
        self.block_manager = block_manager
        self._holdings = Holdings(block_manager)
        self._num_spare_blocks = num_spare_blocks
        self.prefix_caching = prefix_caching
        self._preemption_mode = preemption_mode
        self._costs = costs
        self._arrivals = count()

    @property
    def _num_taken_seats(self) -> int:
        """Of sequences that run, and of those that are to fork from them."""
        return sum(sequence.num_seats for sequence in self.running)

    def _last(self, callers: Collection[Hashable] | None = None, spared: Sequence | None = None) -> Sequence | None:
        """The last running sequence of some callers, or of all, except for one that has just got its blocks."""
        candidates = (s for s in reversed(self.running) if s is not spared)
        return next((s for s in candidates if callers is None or s.caller in callers), None)

    def _queue(self, sequence: Sequence) -> None:
        sequence.status = WAITING
        self.waiting.push(sequence)

    def _admit(self, sequence: Sequence, draft: PlanDraft) -> bool:
        """Let a waiting sequence run, with blocks for all its tokens, if there is a seat and enough stay available.

        What the prefix cache has is shared, what was swapped out comes back; up to the first gap nothing is computed.
        """
        if self._num_taken_seats + sequence.num_seats > self.max_num_seqs:
            return False
        spare = self._num_spare_blocks if self.running else 0
        reads = self.prefix_caching and sequence.reads_prefix_cache
        found = self._holdings.take(sequence, reads, spare, draft)
        if found is None:
            return False
        self.waiting.remove(sequence)
        sequence.status = RUNNING
        insort(self.running, sequence, key=lambda s: s.order)
        if reads:
            self.counts.num_prefix_queries += sequence.num_prompt_tokens
            self.counts.num_prefix_hits += min(found, sequence.num_prompt_tokens)
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start ``child``, whose tokens begin with those that ``parent`` has computed, on the parent's own blocks.

        Nothing is copied until one of them writes to a block that both hold, which can only be the last one. If the
        parent was preempted, so that it has no blocks, or no seat is free, the child waits and computes for itself.
        """
        child.arrival = next(self._arrivals)
        child.order = (*parent.order[:-1], child.arrival)
        parent.num_seats = max(1, parent.num_seats - 1)
        if parent.status is not RUNNING or self._num_taken_seats >= self.max_num_seqs:
            self._queue(child)
            return
        self._holdings.share(parent, child)
        child.num_computed_tokens = parent.num_computed_tokens
        child.status = RUNNING
        insort(self.running, child, key=lambda s: s.order)

    def _preempt(self, sequence: Sequence, draft: PlanDraft) -> None:
        """Take a running sequence's blocks; it waits until it is its turn again."""
        self.running.remove(sequence)
        if self._may_swap(sequence) and self._holdings.swap_out(sequence, draft):
            self.counts.num_swap_preemptions += 1
        else:
            self.counts.num_recompute_preemptions += 1
        self._wait_again(sequence)
        draft.preempted.append(sequence)

    def _may_swap(self, sequence: Sequence) -> bool:
        """Whether a sequence's keys and values are rather copied away than computed again."""
        if self._preemption_mode == "auto":
            assert self._costs is not None
            num_blocks = self._holdings.num_swapped(sequence)
            return self._costs.swapping_is_cheaper(num_blocks, sequence.num_computed_tokens)
        return self._preemption_mode == "swap"

    def _wait_again(self, sequence: Sequence) -> None:
        """Queue a preempted sequence. One that a step under way, or its search, has yet to give a token rests."""
        rests = sequence.num_placeholders or sequence.is_undecided or not sequence.can_step
        self._holdings.release(sequence)
        sequence.num_preemptions += 1
        if rests:
            sequence.status = RESTING
        else:
            drop_provisional(sequence)
            self._queue(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it is, and free its blocks. For one that has ended only the reason is another: the
        text of its last token may hold a stop string."""
        sequence.finish_reason = reason
        if sequence.status is FINISHED:
            return
        if sequence.status is RUNNING:
            self.running.remove(sequence)
        elif sequence.status is WAITING:
            self.waiting.remove(sequence)
        sequence.status = FINISHED
        drop_provisional(sequence)
        if sequence.num_masks:
            del sequence.token_ids[-sequence.num_masks :]
            sequence.num_masks = 0
        self._holdings.release(sequence)
        self._holdings.drop_swapped(sequence)

    def rewind(self, plans: Iterable[SchedulerOutputs]) -> None:
        """Steps under way failed: what they were to compute or copy never came to be, and is computed again.

        Args:
            plans: of all steps that were not committed, the oldest first.
        """
        touched: dict[Sequence, bool] = {}  # whether it has something to compute again, and not just lost its blocks
        for plan in plans:
            for block in plan.remembered:
                self.block_manager.forget(block)
            for sequence in plan.preempted:
                touched.setdefault(sequence, False)
            for item in plan.scheduled:
                touched |= dict.fromkeys((item.sequence, *item.forks), True)
        for sequence, was_under_way in touched.items():
            if sequence.status is FINISHED:
                continue
            rests = sequence.status is RESTING and not was_under_way
            drop_provisional(sequence)
            self._holdings.release(sequence)
            self._holdings.drop_swapped(sequence)
            if sequence.status is RUNNING:
                self.running.remove(sequence)
            if sequence.status is not WAITING and not rests:
                self._queue(sequence)

    def lose_cache(self) -> None:
        """What the blocks of both pools held is gone, while no step is under way: all of it is computed again."""
        for sequence in list(self.running):
            self.running.remove(sequence)
            self._wait_again(sequence)
        for sequence in self.waiting:
            self._holdings.drop_swapped(sequence)
        self.block_manager.forget_all()


def drop_provisional(sequence: Sequence) -> None:
    """Drop placeholders and drafts; what is written on a canvas stays."""
    del sequence.token_ids[sequence.num_known_tokens + sequence.num_masks :]
    sequence.num_placeholders = sequence.num_drafts = 0
    sequence.is_undecided = False
