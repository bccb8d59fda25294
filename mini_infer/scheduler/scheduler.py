"""The scheduler: continuous batching under a token budget.

Every step it answers one question: which sequences compute how many tokens now? A sequence has some tokens whose keys
and values are computed and some whose are not; a step computes the next few. That is all there is: a prompt chunk, a
decode and the recomputation after a preemption differ only in how many are left.
"""

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import NamedTuple

from mini_infer.config import PreemptionMode
from mini_infer.exceptions import InvalidConfigError
from mini_infer.fields import check_int, check_number
from mini_infer.memory import BlockManager
from mini_infer.outputs import FinishReason
from mini_infer.scheduler.policy import FirstComeFirstServed, Policy
from mini_infer.scheduler.preemption import PreemptionCosts
from mini_infer.scheduler.queue import WaitingQueue
from mini_infer.scheduler.sequence import PENDING, Sequence, SequenceStatus


class ScheduledSequence(NamedTuple):
    """A sequence and how many of its tokens this step computes."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step computes its last token, whose logits give the next one."""
        sequence = self.sequence
        return self.num_new_tokens == sequence.num_uncomputed_tokens and len(sequence) < sequence.max_length


class BlockCopy(NamedTuple):
    """Copy one block's keys and values, in every layer."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class SchedulerOutputs:
    """The plan of one step. The copies come first, in the order of the fields; then the forward pass.

    Attributes:
        scheduled: who runs; sequences with one new token first, prompt chunks after them.
        preempted: sequences whose blocks were taken away to make room.
        swap_out: from GPU blocks to CPU blocks.
        copy: from shared GPU blocks to the ones that their writers get for themselves.
        swap_in: from CPU blocks to GPU blocks.
        remembered: blocks that this step fills and that the prefix cache knows from now on.
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    swap_out: list[BlockCopy] = field(default_factory=list)
    copy: list[BlockCopy] = field(default_factory=list)
    swap_in: list[BlockCopy] = field(default_factory=list)
    remembered: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(num_new_tokens for _, num_new_tokens in self.scheduled)

    @property
    def sampling_rows(self) -> list[int]:
        """Of the step's tokens, flattened in the order of ``scheduled``, those whose logits give a next token."""
        ends = accumulate(num_new_tokens for _, num_new_tokens in self.scheduled)
        return [end - 1 for end, item in zip(ends, self.scheduled, strict=True) if item.samples]

    @property
    def only_decodes(self) -> bool:
        """Whether every sequence computes just the token that it sampled last."""
        return all(n == 1 and len(sequence) > sequence.num_prompt_tokens for sequence, n in self.scheduled)


@dataclass(slots=True)
class SchedulerCounts:
    """Totals since the start.

    Attributes:
        num_swapped, num_recomputed: preemptions, by what became of the sequence's KV.
        num_prefix_queries, num_prefix_hits: prompt tokens looked up in the prefix cache, and found there.
    """

    num_swapped: int = 0
    num_recomputed: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0


class Scheduler:
    """Decides about sequences and blocks; knows nothing of tensors.

    Args:
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of one sequence.
        block_size: tokens per KV block.
        max_num_batched_tokens: token budget of one step.
        block_manager: whose blocks to hand out; by default as many as ``max_num_seqs`` full sequences need.
        watermark: share of the blocks that admitting a sequence must leave available, so that those already running
            can grow without preempting it right away.
        policy: who goes first.
        prefix_caching: share full blocks between sequences that begin alike.
        preemption_mode: "swap" needs CPU blocks in the block manager, and recomputes when they run out; "auto" takes
            the cheaper by ``costs``.
        costs: the estimate for "auto".
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        *,
        max_num_batched_tokens: int = 2048,
        block_manager: BlockManager | None = None,
        watermark: float = 0.01,
        policy: Policy | None = None,
        prefix_caching: bool = False,
        preemption_mode: PreemptionMode = "recompute",
        costs: PreemptionCosts | None = None,
    ) -> None:
        check_int(InvalidConfigError, "max_num_seqs", max_num_seqs, 1)
        check_int(InvalidConfigError, "max_model_len", max_model_len, 1)
        check_int(InvalidConfigError, "block_size", block_size, 1)
        check_int(InvalidConfigError, "max_num_batched_tokens", max_num_batched_tokens, 1)
        check_number(InvalidConfigError, "watermark", watermark, 0, 0.5)
        if block_manager is None:
            block_manager = BlockManager(block_size, max_num_seqs * -(-max_model_len // block_size))
        elif block_manager.block_size != block_size:
            raise InvalidConfigError(
                f"block_size={block_size} but the block manager's is {block_manager.block_size}; give both the same"
            )
        if preemption_mode == "auto" and costs is None:
            raise InvalidConfigError("preemption_mode='auto' compares costs; give the scheduler an estimate of them")
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_manager = block_manager
        self.prefix_caching = prefix_caching
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # sorted: the last one is preempted first
        self.counts = SchedulerCounts()
        self._policy = policy or FirstComeFirstServed()
        self._preemption_mode = preemption_mode
        self._costs = costs
        self._watermark_blocks = math.ceil(watermark * block_manager.num_gpu_blocks)
        self._arrivals = count()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidConfigError: it could never run to its ``max_length`` here, so that it would block the queue.
        """
        limit = min(self.max_model_len, self.block_manager.num_gpu_blocks * self.block_manager.block_size)
        check_int(InvalidConfigError, "the sequence's max_length", sequence.max_length, len(sequence), limit)
        check_int(InvalidConfigError, "the sequence's num_forks", sequence.num_forks, 0, self.max_num_seqs - 1)
        sequence.arrival = next(self._arrivals)
        sequence.order = (*self._policy.key(sequence), sequence.arrival)
        self._queue(sequence)

    def is_finished(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self.waiting and not self.running

    # ---- the core loop -------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutputs:
        """Plan a step: decodes first, then prompt chunks that are under way, then whoever waits."""
        plan = SchedulerOutputs()
        budget = self.max_num_batched_tokens

        # Only decodes grow: a prompt got its blocks when it was admitted. Whoever is preempted to make room goes last
        # in this very loop, so nothing was promised to it yet.
        for sequence in [s for s in self.running if s.num_uncomputed_tokens == 1]:
            if budget == 0:
                break
            while sequence.status is SequenceStatus.RUNNING and not self._grow(sequence, plan):
                self._preempt(self.running[-1], plan)
            if sequence.status is SequenceStatus.RUNNING:
                budget -= self._schedule(sequence, budget, plan)

        for sequence in [s for s in self.running if s.num_uncomputed_tokens > 1]:
            if budget == 0:
                break
            budget -= self._schedule(sequence, budget, plan)

        while self.waiting and budget and not (plan.scheduled and plan.preempted):
            if self._admit(self.waiting.first(), plan):
                sequence = self.waiting.pop()
                sequence.status = SequenceStatus.RUNNING
                insort(self.running, sequence, key=lambda s: s.order)
                budget -= self._schedule(sequence, budget, plan)
            elif plan.scheduled or not self.running:
                break
            else:  # beams, all computed, for whose siblings in the queue their own blocks leave no room
                self._preempt(self.running[-1], plan)

        plan.scheduled.sort(key=lambda item: item.num_new_tokens > 1)
        return plan

    def advance(self, plan: SchedulerOutputs) -> list[Sequence]:
        """The step was computed. Returns the sequences that it ended: prompts that nothing is to follow."""
        finished = []
        for sequence, num_new_tokens in plan.scheduled:
            sequence.num_computed_tokens += num_new_tokens
            if sequence.num_uncomputed_tokens == 0 and len(sequence) >= sequence.max_length:
                self.finish(sequence, "length")
                finished.append(sequence)
        return finished

    def append(self, sequence: Sequence, token_id: int) -> bool:
        """Add a token to a sequence whose tokens were all computed. Returns whether that ended it."""
        sequence.token_ids.append(token_id)
        reason = sequence.reason_to_finish()
        if reason is not None:
            self.finish(sequence, reason)
        elif sequence.status is SequenceStatus.NEW:  # preempted when it had nothing to compute
            self._queue(sequence)
        return reason is not None

    def hold(self, sequence: Sequence) -> None:
        """Give the token that a step under way is about to sample a place, so that the next step can be planned.

        A sequence that this brings to its ``max_length`` leaves its seat and its blocks to others at once: whatever
        uses them comes after that step.
        """
        sequence.token_ids.append(PENDING)
        sequence.num_pending_tokens += 1
        if len(sequence) >= sequence.max_length:
            self._leave(sequence)

    def confirm(self, sequence: Sequence, token_id: int) -> None:
        """The first of a sequence's pending tokens is known; ends the sequence if that is a reason to."""
        sequence.token_ids[sequence.num_known_tokens] = token_id
        sequence.num_pending_tokens -= 1
        reason = sequence.reason_to_finish()
        if reason is not None:
            self.finish(sequence, reason)

    def update(self, plan: SchedulerOutputs, sampled_token_ids: Iterable[int]) -> list[Sequence]:
        """``advance``, then ``append`` one token to each scheduled sequence that ``samples``, in their order.

        Returns:
            The sequences that ended, their blocks already free.
        """
        sampling = [item.sequence for item in plan.scheduled if item.samples]
        finished = self.advance(plan)
        for sequence, token_id in zip(sampling, sampled_token_ids, strict=True):
            if self.append(sequence, token_id):
                finished.append(sequence)
        return finished

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start ``child``, whose tokens begin with those that ``parent`` has computed, on the parent's own blocks.

        Nothing is copied until one of them writes to a block that both hold, which can only be the last one. If the
        parent was preempted, so that it has no blocks, or no seat is free, the child waits and computes for itself.
        """
        child.arrival = next(self._arrivals)
        child.order = (*parent.order[:-1], child.arrival)
        parent.num_forks = max(0, parent.num_forks - 1)
        if parent.status is not SequenceStatus.RUNNING or self._num_taken_seats >= self.max_num_seqs:
            self._queue(child)
            return
        child.block_table = list(parent.block_table)
        self.block_manager.share(child.block_table)
        child.content_ids = list(parent.content_ids)
        child.num_computed_tokens = parent.num_computed_tokens
        child.status = SequenceStatus.RUNNING
        insort(self.running, child, key=lambda s: s.order)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it is, and free its blocks."""
        sequence.finish_reason = reason
        self._leave(sequence)

    def undo(self, plan: SchedulerOutputs) -> None:
        """The step failed: whatever it was to compute or copy never came to be, and is computed again."""
        for sequence, _ in plan.scheduled:
            if sequence.status is SequenceStatus.RUNNING:
                self.running.remove(sequence)
                self._wait_again(sequence)
        for sequence in plan.preempted:
            self._drop_swapped(sequence)
        for block in plan.remembered:
            self.block_manager.forget(block)

    def rewind(self, plans: Iterable[SchedulerOutputs], sequences: Iterable[Sequence]) -> None:
        """Steps failed after ``advance``: back to the tokens that are known, whose keys and values are computed again.

        Args:
            plans: of the steps.
            sequences: those that ran in them and are still wanted.
        """
        for plan in plans:
            for block in plan.remembered:
                self.block_manager.forget(block)
        for sequence in sequences:
            del sequence.token_ids[sequence.num_known_tokens :]
            sequence.num_pending_tokens, sequence.finish_reason = 0, None
            self._release(sequence)
            self._drop_swapped(sequence)
            if sequence.status is SequenceStatus.RUNNING:
                self.running.remove(sequence)
            if sequence.status is not SequenceStatus.WAITING:
                self._queue(sequence)

    # ---- one sequence --------------------------------------------------------------------------------------------

    @property
    def _num_taken_seats(self) -> int:
        """Sequences that run, and those that are to fork from them."""
        return sum(1 + sequence.num_forks for sequence in self.running)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence from wherever it is, and free its blocks; does nothing where that happened before."""
        status, sequence.status = sequence.status, SequenceStatus.FINISHED
        if status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif status is SequenceStatus.WAITING:
            self.waiting.note_departure()
        self._release(sequence)
        self._drop_swapped(sequence)

    def _queue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        self.waiting.push(sequence)

    def _schedule(self, sequence: Sequence, budget: int, plan: SchedulerOutputs) -> int:
        """Put as many of a sequence's tokens into the plan as the budget allows; how many that are."""
        num_new_tokens = min(sequence.num_uncomputed_tokens, budget)
        plan.scheduled.append(ScheduledSequence(sequence, num_new_tokens))
        if self.prefix_caching:
            num_tokens = min(sequence.num_computed_tokens + num_new_tokens, sequence.num_known_tokens)
            self._remember(sequence, num_tokens, plan)
        return num_new_tokens

    def _remember(self, sequence: Sequence, num_tokens: int, plan: SchedulerOutputs) -> None:
        """Let others share the full blocks that hold the first ``num_tokens`` tokens once this step is computed.

        They may do so in this very step: in each layer all keys are written before any is read.
        """
        size = self.block_manager.block_size
        for place in range(len(sequence.content_ids), num_tokens // size):
            parent = sequence.content_ids[-1] if sequence.content_ids else sequence.cache_salt
            tokens = sequence.token_ids[place * size : (place + 1) * size]
            block = sequence.block_table[place]
            content_id, is_new = self.block_manager.remember(block, parent, tokens)
            sequence.content_ids.append(content_id)
            if is_new:
                plan.remembered.append(block)

    def _grow(self, sequence: Sequence, plan: SchedulerOutputs) -> bool:
        """See to it that a decode can write its token: a new block, or its own copy of one that others hold too."""
        manager, table = self.block_manager, sequence.block_table
        place = sequence.num_computed_tokens // manager.block_size
        is_copy = place < len(table)
        if is_copy and not manager.is_shared(table[place]):
            return True
        if not manager.can_allocate(1):
            return False
        (block,) = manager.allocate(1)
        if is_copy:
            plan.copy.append(BlockCopy(table[place], block))
            manager.free([table[place]])
            table[place] = block
        else:
            table.append(block)
        return True

    def _admit(self, sequence: Sequence, plan: SchedulerOutputs) -> bool:
        """Give a waiting sequence blocks for all its tokens, if there is a seat and they leave the watermark free.

        What the prefix cache has is shared, what was swapped out comes back; up to the first gap nothing is computed.
        """
        manager, size = self.block_manager, self.block_manager.block_size
        if self._num_taken_seats + sequence.num_forks >= self.max_num_seqs:
            return False
        # The last token is always computed: its logits are wanted.
        reads = self.prefix_caching and sequence.reads_prefix_cache
        match = manager.match_prefix(sequence.token_ids, sequence.cache_salt, (len(sequence) - 1) // size * reads)
        num_new_blocks = manager.blocks_for(len(sequence)) - len(match.blocks)
        spare = self._watermark_blocks if self.running else 0
        if manager.num_available_blocks < num_new_blocks + match.num_unused + spare:
            return False
        if reads:
            self.counts.num_prefix_queries += len(sequence)
            self.counts.num_prefix_hits += len(match.blocks) * size
        manager.share(match.blocks)
        sequence.block_table = match.blocks + manager.allocate(num_new_blocks)
        sequence.content_ids = match.content_ids
        sequence.num_computed_tokens = len(match.blocks) * size
        for place in range(len(match.blocks), len(sequence.swapped_blocks)):
            cpu_block = sequence.swapped_blocks[place]
            if cpu_block is None:
                break
            plan.swap_in.append(BlockCopy(cpu_block, sequence.block_table[place]))
            sequence.num_computed_tokens = min((place + 1) * size, sequence.num_swapped_tokens)
        self._drop_swapped(sequence)
        return True

    def _preempt(self, sequence: Sequence, plan: SchedulerOutputs) -> None:
        """Take a running sequence's blocks; it waits until it is its turn again."""
        self.running.remove(sequence)
        if self._preemption_mode != "recompute" and self._swap_out(sequence, plan):
            self.counts.num_swapped += 1
        else:
            self.counts.num_recomputed += 1
        self._wait_again(sequence)
        plan.preempted.append(sequence)

    def _swap_out(self, sequence: Sequence, plan: SchedulerOutputs) -> bool:
        """Plan to copy a sequence's blocks to CPU memory; False if that is not worth it, or there is no room.

        A block that the prefix cache knows and others hold is left where it is: it will be found again.
        """
        manager = self.block_manager
        table = sequence.block_table[: manager.blocks_for(sequence.num_computed_tokens)]
        stays = [place < len(sequence.content_ids) and manager.is_shared(block) for place, block in enumerate(table)]
        num_moving = len(table) - sum(stays)
        if self._preemption_mode == "auto":
            assert self._costs is not None
            if not self._costs.swapping_is_cheaper(num_moving, sequence.num_computed_tokens):
                return False
        cpu_blocks = manager.allocate_cpu(num_moving)
        if cpu_blocks is None:
            return False
        targets = iter(cpu_blocks)
        sequence.swapped_blocks = [None if stay else next(targets) for stay in stays]
        sequence.num_swapped_tokens = sequence.num_computed_tokens
        plan.swap_out.extend(
            BlockCopy(block, cpu_block)
            for block, cpu_block in zip(table, sequence.swapped_blocks, strict=True)
            if cpu_block is not None
        )
        return True

    def _wait_again(self, sequence: Sequence) -> None:
        """Queue a preempted sequence; one with nothing to compute, until ``append`` gives it something, stays out."""
        has_work = sequence.num_uncomputed_tokens > 0
        self._release(sequence)
        sequence.num_preemptions += 1
        if has_work:
            self._queue(sequence)
        else:
            sequence.status = SequenceStatus.NEW

    def _release(self, sequence: Sequence) -> None:
        self.block_manager.free(sequence.block_table)
        sequence.block_table = []
        sequence.content_ids = []
        sequence.num_computed_tokens = 0

    def _drop_swapped(self, sequence: Sequence) -> None:
        """Free a sequence's CPU blocks. A copy from them that is planned comes before any to them can be."""
        self.block_manager.free_cpu([block for block in sequence.swapped_blocks if block is not None])
        sequence.swapped_blocks = []
        sequence.num_swapped_tokens = 0
