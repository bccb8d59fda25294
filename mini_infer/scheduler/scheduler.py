"""The scheduler: continuous batching under a token budget, first come first served.

Every step it answers one question: which sequences compute how many tokens now? A sequence has some tokens whose keys
and values are computed and some whose are not; a step computes the next few. That is all there is: a prompt chunk, a
decode and the recomputation after a preemption differ only in how many are left.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from mini_infer.exceptions import InvalidConfigError
from mini_infer.fields import check_int, check_number
from mini_infer.memory import BlockManager
from mini_infer.outputs import FinishReason
from mini_infer.scheduler.sequence import Sequence, SequenceStatus


class ScheduledSequence(NamedTuple):
    """A sequence and how many of its tokens this step computes."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step computes its last token, whose logits give the next one."""
        sequence = self.sequence
        return self.num_new_tokens == sequence.num_uncomputed_tokens and len(sequence) < sequence.max_length


@dataclass(frozen=True, slots=True)
class SchedulerOutputs:
    """The plan of one step.

    Attributes:
        scheduled: who runs; sequences with one new token first, prompt chunks after them.
        preempted: sequences whose blocks were taken away to make room.
    """

    scheduled: list[ScheduledSequence]
    preempted: list[Sequence]

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


class Scheduler:
    """Decides about sequences and blocks; knows nothing of tensors.

    Args:
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of one sequence.
        block_size: tokens per KV block.
        max_num_batched_tokens: token budget of one step.
        block_manager: whose blocks to hand out; by default as many as ``max_num_seqs`` full sequences need.
        watermark: share of the blocks that admitting a sequence must leave free, so that those already running can
            grow without preempting it right away.
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
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_manager = block_manager
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival: the last one is preempted first
        self._watermark_blocks = math.ceil(watermark * block_manager.num_gpu_blocks)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidConfigError: it could never run to its ``max_length`` here, so that it would block the queue.
        """
        limit = min(self.max_model_len, self.block_manager.num_gpu_blocks * self.block_manager.block_size)
        check_int(InvalidConfigError, "the sequence's max_length", sequence.max_length, len(sequence), limit)
        self.waiting.append(sequence)

    def is_finished(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self.waiting and not self.running

    def schedule(self) -> SchedulerOutputs:
        """Plan a step: decodes first, then prompt chunks that are under way, then whoever waits."""
        budget = self.max_num_batched_tokens
        scheduled: dict[Sequence, int] = {}
        preempted: list[Sequence] = []

        # The sort is stable: among decodes, and among prompts, whoever came first goes first.
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed_tokens > 1):
            if budget == 0:
                break
            while sequence.status is SequenceStatus.RUNNING and not self._grow(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                preempted.append(victim)
                budget += scheduled.pop(victim, 0)
            if sequence.status is SequenceStatus.RUNNING:
                scheduled[sequence] = min(sequence.num_uncomputed_tokens, budget)
                budget -= scheduled[sequence]

        while self.waiting and budget and not preempted and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            scheduled[sequence] = min(sequence.num_uncomputed_tokens, budget)
            budget -= scheduled[sequence]

        decodes_first = sorted(scheduled.items(), key=lambda item: item[1] > 1)
        return SchedulerOutputs([ScheduledSequence(*item) for item in decodes_first], preempted)

    def update(self, outputs: SchedulerOutputs, sampled_token_ids: Iterable[int]) -> list[Sequence]:
        """Take in a step's results.

        Args:
            outputs: the plan that was carried out.
            sampled_token_ids: one token for each scheduled sequence that ``samples``, in their order.

        Returns:
            The sequences that ended, their blocks already free.
        """
        tokens = iter(sampled_token_ids)
        finished = []
        for scheduled in outputs.scheduled:
            sequence, samples = scheduled.sequence, scheduled.samples
            sequence.num_computed_tokens += scheduled.num_new_tokens
            if samples:
                sequence.token_ids.append(next(tokens))
            elif sequence.num_uncomputed_tokens:
                continue  # the rest of its prompt comes in later steps
            reason = sequence.reason_to_finish()
            if reason is not None:
                self.finish(sequence, reason)
                finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it is, and free its blocks."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence the blocks that all its tokens need; False if there are not enough."""
        missing = self.block_manager.blocks_for(len(sequence)) - len(sequence.block_table)
        if missing > 0:
            if not self.block_manager.can_allocate(missing):
                return False
            sequence.block_table += self.block_manager.allocate(missing)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if there is a seat, and blocks for all its tokens above the watermark."""
        if len(self.running) == self.max_num_seqs:
            return False
        spare = self._watermark_blocks if self.running else 0
        if self.block_manager.num_free_blocks < self.block_manager.blocks_for(len(sequence)) + spare:
            return False
        self._grow(sequence)
        sequence.status = SequenceStatus.RUNNING
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits at the head of the queue and is recomputed later."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.block_manager.free(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0
