"""The scheduler: continuous batching under a token budget.

Every step it answers one question: which sequences compute how many tokens now? A sequence has some tokens whose keys
and values are computed and some whose are not; a step computes the next few. That is all there is: a prompt chunk, a
decode, drafts to verify and the recomputation after a preemption differ only in how many are left.

``schedule`` takes it that the step will be computed, so that the next one can be planned while it is under way: tokens
count as computed, and what the step samples has a placeholder. ``commit`` says what came of it; ``rewind`` that nothing
did.
"""

import math
from collections.abc import Hashable, Iterable
from operator import itemgetter

from mini_infer.config import PreemptionMode
from mini_infer.exceptions import InvalidConfigError
from mini_infer.fields import check_int, check_number
from mini_infer.memory import BlockManager
from mini_infer.outputs import FinishReason
from mini_infer.scheduler.plan import Outcome, PlanDraft, ScheduledSequence, SchedulerOutputs
from mini_infer.scheduler.policy import FirstComeFirstServed, Policy
from mini_infer.scheduler.preemption import PreemptionCosts
from mini_infer.scheduler.roster import FINISHED, RESTING, RUNNING, Roster
from mini_infer.scheduler.sequence import PLACEHOLDER, Reuse, Sequence
from mini_infer.scheduler.shares import StepShares, crowding_callers, overdrawn_callers


class Scheduler(Roster):
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
        fair_size: sequences that a step may decode before callers with many of them take turns among their own.
        num_stages: steps that are under way at once, none of which may need what another one samples; each then takes
            its fair share of the sequences and of the budget.
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
        fair_size: int = 32,
        num_stages: int = 1,
    ) -> None:
        check_int(InvalidConfigError, "max_num_seqs", max_num_seqs, 1)
        check_int(InvalidConfigError, "max_model_len", max_model_len, 1)
        check_int(InvalidConfigError, "block_size", block_size, 1)
        check_int(InvalidConfigError, "max_num_batched_tokens", max_num_batched_tokens, 1)
        check_number(InvalidConfigError, "watermark", watermark, 0, 0.5)
        check_int(InvalidConfigError, "fair_size", fair_size, 1)
        if block_manager is None:
            block_manager = BlockManager(block_size, max_num_seqs * -(-max_model_len // block_size))
        elif block_manager.block_size != block_size:
            raise InvalidConfigError(
                f"block_size={block_size} but the block manager's is {block_manager.block_size}; give both the same"
            )
        if preemption_mode == "auto" and costs is None:
            raise InvalidConfigError("preemption_mode='auto' compares costs; give the scheduler an estimate of them")
        num_spare_blocks = math.ceil(watermark * block_manager.num_gpu_blocks)
        super().__init__(max_num_seqs, block_manager, num_spare_blocks, prefix_caching, preemption_mode, costs)
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self._shares = StepShares(fair_size)
        self._policy = policy or FirstComeFirstServed()
        self._num_stages = num_stages

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidConfigError: it could never run to its ``max_length`` here, so that it would block the queue.
        """
        num_blocks = self.block_manager.num_gpu_blocks // (1 if sequence.twin is None else 2)
        num_slots = num_blocks * self.block_manager.block_size
        limit = self.max_model_len if sequence.is_whole else min(self.max_model_len, num_slots)
        check_int(InvalidConfigError, "the sequence's max_length", sequence.max_length, len(sequence), limit)
        check_int(InvalidConfigError, "tokens whose keys the sequence keeps", sequence.num_slots, 0, num_slots)
        check_int(
            InvalidConfigError,
            "what a step must compute at once",
            sequence.least_tokens,
            1,
            self.max_num_batched_tokens,
        )
        least = 1 + len(sequence.forks)
        check_int(InvalidConfigError, "the sequence's num_seats", sequence.num_seats, least, self.max_num_seqs)
        sequence.arrival = next(self._arrivals)
        key = self._policy.key(sequence)
        for number in key:
            check_number(InvalidConfigError, "each number of the policy's key", number, -math.inf)
        sequence.order = (*key, sequence.arrival)
        self._queue(sequence)

    def is_finished(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self.waiting and not self.running

    # ---- planning ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutputs:
        """Plan a step: decodes first, then prompt chunks that are under way, then whoever waits.

        An empty plan means that there is nothing to compute now; where steps are under way, there may be once they are
        committed.
        """
        budget = -(-self.max_num_batched_tokens // self._num_stages)
        room = -(-(len(self.running) + len(self.waiting)) // self._num_stages)
        callers = {s.caller for s in self.running} | self.waiting.callers
        draft = PlanDraft(budget, room, self._shares.prompt_tokens(len(callers)))
        newcomer = self._let_in_newcomer(draft)
        ready = [sequence for sequence in self.running if sequence.can_step and sequence is not newcomer]
        if self._num_stages > 1:
            ready = [sequence for sequence in ready if not sequence.num_placeholders]
        chunks = self._plan_decodes(self._shares.choose(ready, self.waiting.callers), newcomer, draft)
        self._plan_chunks(chunks, draft)
        self._admit_waiting(draft)
        plan = draft.finish(budget - draft.budget)
        for item in plan.scheduled:
            self._expect(item)
        return plan

    def _let_in_newcomer(self, draft: PlanDraft) -> Sequence | None:
        """Whoever has nothing running, and wants no more than a share of the blocks, need not wait for those who hold
        more: the last of their sequences are preempted."""
        callers = {sequence.caller for sequence in self.running}
        if not callers or self.waiting.callers <= callers:
            return None
        newcomer = self.waiting.first(callers)
        if newcomer is None or self._num_taken_seats + newcomer.num_seats > self.max_num_seqs:
            return None
        if newcomer.least_tokens > draft.budget:
            return None
        if newcomer.swapped_blocks:
            return None  # a plan copies out before it copies in, and others may still have to be copied out
        num_wanted = self.block_manager.blocks_for(newcomer.num_slots) + self._num_spare_blocks
        is_modest = num_wanted <= self.block_manager.num_gpu_blocks // (len(callers) + 1)
        while not self._admit(newcomer, draft):
            last = self._last(self._overdrawn(num_more=1))
            if last is None or not is_modest:
                return None
            self._preempt(last, draft)
        self._schedule_prompt(newcomer, draft)  # at once: whoever gets blocks is in the plan, for ``rewind`` to find
        return newcomer

    def _plan_decodes(self, ready: list[Sequence], newcomer: Sequence | None, draft: PlanDraft) -> list[Sequence]:
        """Plan what was sampled last, and drafts behind it, and preempt where that needs blocks; those with more to
        compute, and blocks for it, are given back.

        Decodes need more blocks, and so may those that got several tokens at once; a prompt got its own when it was
        admitted. Whoever is preempted to make room goes last in this very loop, so nothing was promised to it yet.
        """
        overdrawn = self._overdrawn()
        if overdrawn:  # they go last, so that they are preempted first
            ready.sort(key=lambda sequence: sequence.caller in overdrawn)
        num_guesses = max(0, draft.budget - len(ready))  # drafts take what the others leave
        chunks = []
        for sequence in ready:
            if draft.is_full:
                break
            if sequence.status is not RUNNING:
                continue
            if sequence.num_drafts:
                self._shorten(sequence, min(num_guesses, draft.budget - 1))
            elif len(sequence.token_ids) - sequence.num_computed_tokens > 1 and not any(
                self._holdings.find_missing(sequence)
            ):
                chunks.append(sequence)
                continue
            while not self._holdings.grow(sequence, draft):
                if sequence.num_drafts:  # nobody is preempted for a guess
                    self._shorten(sequence, 0)
                    continue
                if self._withdraw_drafts(draft):
                    continue
                self._preempt(self._last(overdrawn, newcomer) or self._last(None, newcomer) or sequence, draft)
                if sequence.status is not RUNNING:
                    break
            else:
                num_guesses -= sequence.num_drafts
                self._schedule(sequence, draft.budget, draft)
        return chunks

    def _plan_chunks(self, chunks: list[Sequence], draft: PlanDraft) -> None:
        """Go on with prompts that were begun."""
        for sequence in chunks:
            if draft.is_full:
                break
            is_running, fits = sequence.status is RUNNING, sequence.least_tokens <= draft.budget
            if is_running and fits and sequence.caller not in draft.served:
                self._schedule_prompt(sequence, draft)

    def _admit_waiting(self, draft: PlanDraft) -> None:
        """Begin with whoever waits, unless somebody was preempted to get this far."""
        while self.waiting and not draft.is_full and not (draft.scheduled and draft.preempted):
            crowding = crowding_callers(self.running, self._num_taken_seats, self.max_num_seqs)
            first = self.waiting.first({*crowding, *draft.served})
            if first is None or first.least_tokens > draft.budget:
                break
            if self._admit(first, draft):
                self._schedule_prompt(first, draft)
            elif draft.scheduled or not self.running:
                break
            elif any(s.num_placeholders or s.is_undecided for s in self.running):
                break  # a step under way will free some
            else:  # beams, all computed, for whose siblings in the queue their own blocks leave no room
                self._preempt(self.running[-1], draft)

    def _overdrawn(self, num_more: int = 0) -> set[Hashable]:
        return overdrawn_callers(
            self.running, self.block_manager.num_gpu_blocks, self.block_manager.block_size, num_more
        )

    def _schedule_prompt(self, sequence: Sequence, draft: PlanDraft) -> None:
        """Plan as much of a prompt as its caller's share of prompts allows, and as must be computed at once."""
        num_tokens = draft.budget
        if sequence.caller is not None:
            num_uncomputed = min(sequence.num_uncomputed_tokens, draft.budget)
            num_tokens = draft.charge(sequence.caller, num_uncomputed, sequence.least_tokens)
        self._schedule(sequence, num_tokens, draft)

    def _schedule(self, sequence: Sequence, num_tokens: int, draft: PlanDraft) -> None:
        """Put so many of a sequence's tokens into the plan, if it has them and the budget allows. Those that see each
        other stay together."""
        (start, end), num_drafts = sequence.uncomputed, sequence.num_drafts
        num_tokens = min(num_tokens, draft.budget, end - start)
        if start + num_tokens < end:
            num_tokens -= num_tokens % sequence.span
            if num_tokens <= 0:
                return
        reaches_end, known = start + num_tokens == end, sequence.num_known_tokens
        samples = reaches_end and known + sequence.num_placeholders < sequence.max_length
        item = ScheduledSequence(
            sequence,
            start,
            num_tokens,
            1 + num_drafts if samples else 0,
            reaches_end and start >= sequence.num_prompt_tokens and num_tokens == 1 + num_drafts,
            sequence.forks if samples else (),
            sequence.reuse,
        )
        draft.budget -= item.num_rows
        draft.scheduled.append(item)
        fills_blocks = (start + num_tokens) // self.block_manager.block_size > len(sequence.content_ids)
        if self.prefix_caching and fills_blocks:
            # What becomes of a step that decides late is not certain, not even whether its keys and values are valid;
            # on a canvas, those are whose neighbours are all known.
            is_certain = not (samples and sequence.decides_late) or sequence.num_masks
            certain = min(start + num_tokens, known) if is_certain else start
            self._holdings.remember(sequence, certain - certain % sequence.span, draft)

    def _expect(self, item: ScheduledSequence) -> None:
        """Take it that a planned step will be computed: the next plan builds on it."""
        sequence, start, num_tokens, num_logits, _, forks, _ = item
        sequence.num_computed_tokens = start + num_tokens
        if not num_logits:
            return
        if forks:
            sequence.forks = ()
            for child in forks:
                self.fork(sequence, child)
        if sequence.decides_late or sequence.num_drafts:
            for one in (sequence, *forks):
                one.is_undecided = True
            return
        sequence.token_ids.append(PLACEHOLDER)
        sequence.num_placeholders += 1
        for child in forks:
            child.token_ids.append(PLACEHOLDER)
            child.num_placeholders += 1

    def propose(self, sequence: Sequence, draft_token_ids: Iterable[int]) -> None:
        """Put drafts behind a sequence's last token, for the next step to compute along with it.

        Nothing happens where there can be none: the sequence does not run, has a step under way, is still computing its
        prompt, or has forks that are to start from what it samples. What would go beyond ``max_length`` is left out,
        with a place for the token after the last draft.
        """
        room = sequence.max_length - len(sequence) - 1
        waits_for_step = sequence.num_placeholders or sequence.num_drafts or sequence.is_undecided or sequence.forks
        if sequence.status is RUNNING and not waits_for_step and sequence.num_uncomputed_tokens == 1:
            drafts = list(draft_token_ids)[: max(room, 0)]
            sequence.token_ids += drafts
            sequence.num_drafts = len(drafts)

    def _shorten(self, sequence: Sequence, num_drafts: int) -> None:
        """Leave out all but the first ``num_drafts`` drafts."""
        surplus = sequence.num_drafts - num_drafts
        if surplus > 0:
            del sequence.token_ids[-surplus:]
            sequence.num_drafts -= surplus

    def _withdraw_drafts(self, draft: PlanDraft) -> bool:
        """Take the drafts out of the plan again, with the blocks that they alone need; False if there are none."""
        withdrawn = 0
        for place, item in enumerate(draft.scheduled):
            sequence = item.sequence
            if sequence.num_drafts:
                withdrawn += sequence.num_drafts
                self._shorten(sequence, 0)
                draft.scheduled[place] = item._replace(num_tokens=1, num_logits=1)
                self._holdings.trim(sequence)
        draft.budget += withdrawn
        return withdrawn > 0

    # ---- what came of it -----------------------------------------------------------------------------------------

    def commit(self, outcomes: Iterable[Outcome]) -> None:
        """A step was computed: tokens become known, keys and values valid, sequences end. All of it, or none.

        The one way in which a sequence grows. Chunks without logits need no outcome, unless nothing is to follow the
        prompt. Outcomes of sequences that have ended meanwhile are passed over.

        Raises:
            ValueError: an outcome that does not follow from the plan; nothing has changed then.
        """
        wanted = []
        for outcome in outcomes:
            sequence, token_ids, num_valid, finish_reason, canvas, reuse = outcome
            if sequence.status is FINISHED:
                continue
            known = sequence.num_known_tokens
            length = known + len(token_ids)
            if sequence.num_placeholders:
                fits = length == known + 1 or (not token_ids and finish_reason is not None)
            elif num_valid < len(sequence.content_ids) * self.block_manager.block_size:
                fits = False  # others may share what this would take back
            elif sequence.num_masks:
                num_places = len(token_ids) + len(canvas)
                fits = sequence.num_masks <= num_places <= sequence.max_length - known or finish_reason is not None
            elif sequence.decides_late:
                fits = length <= sequence.max_length
            else:
                fits = length <= known + (1 + sequence.num_drafts if sequence.is_undecided else 0)
            if not fits or not 0 <= num_valid <= length:
                raise ValueError(
                    f"sequence {sequence.request_id!r} cannot go on by {len(token_ids)} tokens with {num_valid} "
                    f"positions valid; it has {known} known tokens of at most {sequence.max_length}, and under way are "
                    f"{sequence.num_placeholders} to sample and {sequence.num_drafts} drafts"
                )
            wanted.append((sequence, known, token_ids, num_valid, finish_reason, canvas, reuse))
        if len(set(map(itemgetter(0), wanted))) < len(wanted):
            raise ValueError("a sequence cannot go on in two ways; give each one outcome")
        for settled in wanted:
            self._commit(*settled)

    def _commit(
        self,
        sequence: Sequence,
        known: int,
        token_ids: tuple[int, ...],
        num_valid: int,
        finish_reason: FinishReason | None,
        canvas: tuple[int, ...],
        reuse: Reuse | None,
    ) -> None:
        length = known + len(token_ids)
        if sequence.num_placeholders:
            for place, token_id in enumerate(token_ids, known):
                sequence.token_ids[place] = token_id
            sequence.num_placeholders -= len(token_ids)
        elif sequence.is_undecided or token_ids:
            sequence.token_ids[known:] = (*token_ids, *canvas)
            sequence.num_drafts, sequence.num_masks = 0, len(canvas)
            if sequence.twin is not None:
                sequence.twin.token_ids[known:] = sequence.token_ids[known:]
            sequence.is_undecided = False
            sequence.reuse = reuse if sequence.status is RUNNING else None  # whose blocks it still has
            self._invalidate(sequence, num_valid)
        if finish_reason is None and length >= sequence.max_length:
            # The last token is not computed; a prompt that nothing is to follow is.
            has_ended = length > sequence.num_prompt_tokens or num_valid >= length
            finish_reason = "length" if has_ended else None
        if finish_reason is not None:
            self.finish(sequence, finish_reason)
        elif sequence.status is RESTING and num_valid < len(sequence) and not sequence.num_placeholders:
            self._queue(sequence)  # otherwise all is computed, and it rests on until it gets a token

    def _invalidate(self, sequence: Sequence, num_valid: int) -> None:
        """Keys and values from position ``num_valid`` on are not what they should be."""
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, num_valid)
        sequence.num_swapped_tokens = min(sequence.num_swapped_tokens, num_valid)
