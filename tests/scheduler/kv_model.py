"""An exhaustive stand-in for the executor: each slot remembers which prefix was computed there; every use checks it.

What a real model would get wrong silently, attending to another sequence's keys, is an assertion here. A step is
carried out when it is completed, not when it is planned, from the numbers that stood in its plan then.
"""

import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mini_infer.memory import BlockManager
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import (
    Outcome,
    ScheduledSequence,
    Scheduler,
    SchedulerOutputs,
    Sequence,
    SequenceStatus,
)
from mini_infer.scheduler.sequence import PLACEHOLDER

NUM_TOKENS = 3
"""Size of the vocabulary: so small that sequences often continue alike."""

Prefix = int | None
"""Stands for some tokens after a certain salt, no two alike; None for garbage."""


def next_token(token_ids: list[int], index: int) -> int:
    """The token that follows, a function of the tokens before it and of which fork it is, like a seeded sample."""
    return hash((len(token_ids), *token_ids[-4:], index)) % NUM_TOKENS


def continuation(sequence: Sequence, token_ids: list[int], index: int) -> Iterator[tuple[int, FinishReason | None]]:
    """The tokens that follow, up to the last one, and why it is the last."""
    tokens = list(token_ids)
    while len(tokens) < sequence.max_length:
        tokens.append(next_token(tokens, index))
        stops = hash((7, len(tokens), *tokens[-3:], index)) % 17 == 0
        yield tokens[-1], "stop" if stops else None
        if stops:
            return


def choose(beams: list[list[int]], width: int) -> list[list[int]]:
    """With which tokens each beam goes on; with none if there are better ones."""
    candidates = sorted(
        (hash((5, len(beam), *beam[-4:], token)) % 1009, place, token)
        for place, beam in enumerate(beams)
        for token in range(NUM_TOKENS)
    )
    best = candidates[: 1 + hash((11, len(beams[0]), *beams[0][-4:])) % width]
    return [[token for _, place, token in best if place == beam] for beam in range(len(beams))]


@dataclass(eq=False)
class Search:
    """A beam search: all beams of a round are computed before the next round begins."""

    prompt: list[int]
    max_length: int
    width: int
    beams: list[Sequence] = field(default_factory=list)
    computed: set[Sequence] = field(default_factory=set)
    results: list[list[int]] = field(default_factory=list)
    is_aborted: bool = False

    def results_alone(self) -> list[list[int]]:
        beams = [self.prompt]
        while len(beams[0]) < self.max_length:
            chosen = choose(beams, self.width)
            beams = [[*beam, token] for beam, tokens in zip(beams, chosen, strict=True) for token in tokens]
        return beams


class Work(NamedTuple):
    """A scheduled sequence as the executor was told of it."""

    item: ScheduledSequence
    token_ids: list[int]
    block_table: list[int]
    num_known: int


class Flight(NamedTuple):
    """A step under way."""

    plan: SchedulerOutputs
    said: tuple[Any, ...]
    work: list[Work]


def numbers(plan: SchedulerOutputs) -> tuple[Any, ...]:
    """All that a plan says, in objects of its own."""
    scheduled = [(*item[:5], item.end, list(item.forks)) for item in plan.scheduled]
    copies = [[(*copy,) for copy in copies] for copies in (plan.swap_out, plan.copy, plan.swap_in)]
    return scheduled, copies, plan.num_tokens, list(plan.preempted), list(plan.remembered), plan.only_decodes


class KVModel:
    """Drives a scheduler, and carries out its plans on pools of blocks whose slots hold what was computed there.

    Args:
        depth: most steps that are under way at once.
        draft_rate: how often drafts are proposed.
        seed: of everything that the executor and the search for tokens may decide either way.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 1, draft_rate: float = 0.0, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.sequences: list[Sequence] = []
        self.searches: list[Search] = []
        self.flights: deque[Flight] = deque()
        self._draft_rate = draft_rate
        self._random = random.Random(seed)
        self._size = scheduler.block_manager.block_size
        self._gpu: dict[int, list[Prefix]] = {}
        self._cpu: dict[int, list[Prefix]] = {}
        self._device_tokens: dict[Sequence, list[int]] = {}
        self._index: dict[Sequence, int] = {}
        self._search_of: dict[Sequence, Search] = {}
        self._prefixes: dict[tuple[Any, int], int] = {}

    def add(self, sequence: Sequence, search: Search | None = None) -> None:
        self._meet(sequence, 0)
        for index, child in enumerate(sequence.forks, 1):
            self._meet(child, index)
        if search is not None:
            self.searches.append(search)
            self._join(search, sequence)
        self.scheduler.add(sequence)

    def is_finished(self) -> bool:
        return all(sequence.status is SequenceStatus.FINISHED for sequence in self.sequences)

    def step(self) -> None:
        """Plan as many steps as may be under way, and complete the oldest."""
        while len(self.flights) < self.depth and self.plan():
            pass
        if self.flights:
            self.complete()

    def plan(self) -> bool:
        """Plan a step; whether there was anything in it."""
        for sequence in list(self.scheduler.running):
            if sequence not in self._search_of and self._random.random() < self._draft_rate:
                self._propose(sequence)
        plan = self.scheduler.schedule()
        work = [
            Work(item, item.sequence.token_ids[: item.end], list(item.sequence.block_table), self._num_known(item))
            for item in plan.scheduled
        ]
        going_on = [sequence for sequence in self.sequences if sequence.status is not SequenceStatus.FINISHED]
        assert plan.scheduled or self.flights or not going_on, f"no step would ever end {going_on}"
        self._check_plan(plan, work)
        self.check_blocks()
        if plan == SchedulerOutputs():
            return False
        self.flights.append(Flight(plan, numbers(plan), work))
        return bool(plan.scheduled)

    def complete(self) -> None:
        """Carry out the oldest step under way, and commit what came of it."""
        flight = self.flights.popleft()
        assert numbers(flight.plan) == flight.said, "a plan changed after it was made"
        self._copy(flight.plan)
        self._compute(flight)
        outcomes = [outcome for work in flight.work for outcome in self._decide(work)]
        self._check_remembered(flight)
        ends = [search for search in self.searches if search.beams and search.computed == set(search.beams)]
        # The beams that end a round may be told at once how they go on, or rest like those before them.
        skipped = {beam for search in ends if self._random.random() < 0.5 for beam in search.beams}
        self.scheduler.commit(outcome for outcome in outcomes if outcome.sequence not in skipped)
        for search in ends:
            self._end_round(search)
        self.check_blocks()

    def fail(self) -> None:
        """All steps under way fail, with garbage wherever they were to write."""
        for plan, said, work in self.flights:
            assert numbers(plan) == said, "a plan changed after it was made"
            for _, target in plan.swap_out:
                self._cpu[target] = [None] * self._size
            for _, target in (*plan.copy, *plan.swap_in):
                self._gpu[target] = [None] * self._size
            for item, _, table, _ in work:
                for position in range(item.start, item.end):
                    self._write(table, position, None)
        preemptions = [sequence.num_preemptions for sequence in self.sequences]
        self.scheduler.rewind([flight.plan for flight in self.flights])
        assert preemptions == [sequence.num_preemptions for sequence in self.sequences], "a failure is no preemption"
        self.flights.clear()
        self.check_blocks()
        for sequence in self.sequences:
            assert sequence.num_placeholders == 0 and not sequence.is_undecided

    def abort(self, sequence: Sequence) -> None:
        """End a sequence, with those that have not forked from it yet, and the search that it belongs to."""
        search = self._search_of.get(sequence)
        if search is None:
            for one in (*sequence.forks, sequence):
                self.scheduler.finish(one, "abort")
        else:
            search.is_aborted = True
            for beam in search.beams:
                self.scheduler.finish(beam, "abort")
            search.beams = []
        self.check_blocks()

    # ---- invariants ----------------------------------------------------------------------------------------------

    def check_blocks(self) -> None:
        """Every block is free, cached, or held by exactly those whose tables name it; nobody is in two places."""
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        holders = Counter(block for sequence in scheduler.running for block in sequence.block_table)
        assert len(holders) == manager.num_used_blocks
        assert all(manager.is_shared(block) == (count > 1) for block, count in holders.items())
        total = manager.num_used_blocks + manager.num_free_blocks + manager.num_cached_blocks
        assert total == manager.num_gpu_blocks
        assert not set(manager.cached_blocks) & set(holders)
        swapped = [block for s in self.sequences for block in s.swapped_blocks if block is not None]
        assert len(swapped) == len(set(swapped)) == manager.num_cpu_blocks - manager.num_free_cpu_blocks
        assert sum(sequence.num_seats for sequence in scheduler.running) <= scheduler.max_num_seqs
        places = Counter([*scheduler.running, *scheduler.waiting])
        assert len(scheduler.waiting) == len(list(scheduler.waiting))
        assert scheduler.running == sorted(scheduler.running, key=lambda sequence: sequence.order)
        under_way = [item for flight in self.flights for item in flight.plan.scheduled]
        expected = {one for item in under_way for one in (item.sequence, *item.forks)}
        for sequence in self.sequences:
            waits_or_runs = sequence.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING)
            assert places[sequence] == waits_or_runs
            if sequence.status is SequenceStatus.WAITING:
                assert sequence in scheduler.waiting and sequence.can_step and not sequence.block_table
                assert sequence.num_known_tokens == len(sequence), "nothing is under way for it"
            if sequence.status is SequenceStatus.RUNNING:
                assert sequence.num_computed_tokens <= len(sequence.block_table) * self._size
            if sequence.status is SequenceStatus.RESTING:
                search = self._search_of.get(sequence)
                assert sequence in expected or (search is not None and sequence in search.computed), "it rests for ever"
            assert PLACEHOLDER not in sequence.token_ids[: sequence.num_known_tokens]

    def check_finished(self) -> None:
        """Everything is done, nothing leaked, and every sequence has the tokens that it would have alone."""
        manager = self.scheduler.block_manager
        assert self.is_finished() and self.scheduler.is_finished()
        assert (manager.num_used_blocks, manager.num_free_cpu_blocks) == (0, manager.num_cpu_blocks)
        for sequence in self.sequences:
            if sequence not in self._search_of:
                self._check_tokens(sequence)
        for search in self.searches:
            assert search.is_aborted or sorted(search.results) == sorted(search.results_alone())

    def _check_tokens(self, sequence: Sequence) -> None:
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        alone = list(continuation(sequence, prompt, self._index[sequence]))
        generated = sequence.token_ids[sequence.num_prompt_tokens :]
        if sequence.finish_reason == "abort":
            assert generated == [token for token, _ in alone[: len(generated)]]
        else:
            assert generated == [token for token, _ in alone]
            assert sequence.finish_reason == (alone[-1][1] if alone else None) or sequence.finish_reason == "length"
            assert sequence.finish_reason == "stop" or len(sequence) == sequence.max_length

    def _check_plan(self, plan: SchedulerOutputs, work: list[Work]) -> None:
        scheduler = self.scheduler
        assert sum(item.num_tokens for item in plan.scheduled) == plan.num_tokens <= scheduler.max_num_batched_tokens
        counts = [item.num_tokens for item in plan.scheduled]
        assert counts == sorted(counts, key=lambda n: n > 1), "decodes come first"
        assert len({item.sequence for item in plan.scheduled}) == len(plan.scheduled)
        for item, token_ids, table, _ in work:
            sequence = item.sequence
            assert item.num_tokens > 0 and len(token_ids) == item.end
            assert len(table) * self._size >= item.end, "it plans positions without blocks"
            assert item.is_decode == (
                item.start >= sequence.num_prompt_tokens and item.num_logits > 0 and item.num_tokens == item.num_logits
            )
        for block in plan.remembered:
            holders = [(w, place) for w in work for place, held in enumerate(w.block_table) if held == block]
            assert holders, "nobody fills it"
            assert all((place + 1) * self._size <= w.num_known for w, place in holders), "provisional tokens are hashed"

    def _check_remembered(self, flight: Flight) -> None:
        for block in flight.plan.remembered:
            for item, token_ids, table, _ in flight.work:
                if block in table:
                    end = (table.index(block) + 1) * self._size
                    assert self._gpu[block] == self._chain(item.sequence, token_ids[:end])[end - self._size :]

    # ---- the executor --------------------------------------------------------------------------------------------

    def _copy(self, plan: SchedulerOutputs) -> None:
        for source, target in plan.swap_out:
            self._cpu[target] = list(self._block(source))
        before = {source: list(self._block(source)) for source, _ in plan.copy}
        for source, target in plan.copy:
            assert self._block(source) == before[source], "a copy's source is another one's target"
            self._gpu[target] = list(before[source])
        for source, target in plan.swap_in:
            self._gpu[target] = list(self._cpu[source])

    def _compute(self, flight: Flight) -> None:
        """In each layer all keys are written before any is read, so sequences may share what this step computes."""
        chains, writers = [], set()
        for item, token_ids, table, _ in flight.work:
            device = self._device_tokens[item.sequence]
            tokens = [device[i] if t == PLACEHOLDER else t for i, t in enumerate(token_ids)]
            assert tokens[: len(device)] == device[: len(tokens)]
            chains.append(self._chain(item.sequence, tokens))
            for position in range(item.start, item.end):
                slot = (table[position // self._size], position % self._size)
                assert slot not in writers, "two sequences write to one slot"
                writers.add(slot)
                self._write(table, position, chains[-1][position])
        for work, chain in zip(flight.work, chains, strict=True):
            table = work.block_table
            for place in range(-(-len(chain) // self._size)):
                here = chain[place * self._size : (place + 1) * self._size]
                assert self._block(table[place])[: len(here)] == here, "it reads what is not its own"

    def _decide(self, work: Work) -> Iterable[Outcome]:
        """What the step brings to a sequence and its forks. What is not valid of its keys is garbage from now on."""
        item, token_ids, table, num_known = work
        sequence = item.sequence
        if item.num_logits == 0:
            if item.end == sequence.num_prompt_tokens == sequence.max_length:
                yield Outcome(sequence, (), item.end)
            return
        if sequence in self._search_of:
            self._search_of[sequence].computed.add(sequence)
            yield Outcome(sequence, (), item.end)
            return
        drafts = token_ids[num_known:]
        known = self._device_tokens[sequence][:num_known]
        # A step that settles nothing, or whose keys are not all valid, is so for all that hold the blocks.
        settles = not sequence.decides_late or self._random.random() < 0.7
        most_valid = item.end
        if sequence.decides_late and self._random.random() < 0.5:
            most_valid = self._random.randint(item.start, item.end)
        for one in (sequence, *item.forks):
            true = list(continuation(one, known, self._index[one]))
            accepted = next((i for i, d in enumerate(drafts) if i >= len(true) or d != true[i][0]), len(drafts))
            wanted = 1 + accepted if accepted == len(drafts) else 1 + self._random.randint(0, accepted)
            if sequence.decides_late:
                wanted = self._random.randint(1, 5) * settles
            new = true[:wanted]
            num_valid = min(most_valid, num_known + min(accepted, len(new) - 1)) if new else item.start
            self._device_tokens[one] = known + [token for token, _ in new]
            for position in range(num_valid, item.end):
                self._write(table, position, None)
            yield Outcome(one, tuple(token for token, _ in new), num_valid, new[-1][1] if new else None)

    def _propose(self, sequence: Sequence) -> None:
        known = sequence.token_ids[: sequence.num_known_tokens]
        true = [token for token, _ in continuation(sequence, known, self._index[sequence])]
        true = (true + [0] * 5)[: self._random.randint(0, 5)]
        drafts = [token if self._random.random() < 0.7 else self._random.randrange(NUM_TOKENS) for token in true]
        before = (sequence.num_drafts, len(sequence))
        self.scheduler.propose(sequence, drafts)
        if (sequence.num_drafts, len(sequence)) != before:
            assert len(known) + sequence.num_drafts == len(sequence) < sequence.max_length
            assert sequence.num_computed_tokens == len(known) - 1 and not sequence.forks
            assert not sequence.num_placeholders and not sequence.is_undecided

    def _num_known(self, item: ScheduledSequence) -> int:
        """Of the tokens that a step computes and those before, how many were known or placeholders, and not drafts."""
        return item.end - max(0, item.num_logits - 1)

    # ---- beams ---------------------------------------------------------------------------------------------------

    def _end_round(self, search: Search) -> None:
        beams, search.beams = search.beams, []
        search.computed.clear()
        known = [self._device_tokens[beam] for beam in beams]
        chosen = choose(known, search.width)
        losers = [beam for beam, tokens in zip(beams, chosen, strict=True) if not tokens]
        losers_first, forks_first = self._random.random() < 0.7, self._random.random() < 0.5
        if losers_first:
            self._finish(losers)
        for beam, before, tokens in zip(beams, known, chosen, strict=True):
            if not tokens:
                continue
            is_last = len(before) + 1 == search.max_length
            if is_last:
                search.results += [[*before, token] for token in tokens]
            self._device_tokens[beam] = [*before, tokens[0]]
            outcome = Outcome(beam, (tokens[0],), len(before))
            if not forks_first:
                self.scheduler.commit([outcome])
            if not is_last:
                self._join(search, beam)
                for token in tokens[1:]:
                    child = like(beam, [*before, token])
                    self._meet(child, 0)
                    self._join(search, child)
                    self.scheduler.fork(beam, child)
            if forks_first:
                self.scheduler.commit([outcome])
        if not losers_first:
            self._finish(losers)

    def _finish(self, beams: list[Sequence]) -> None:
        for beam in beams:
            self.scheduler.finish(beam, "stop")

    def _join(self, search: Search, beam: Sequence) -> None:
        self._search_of[beam] = search
        search.beams.append(beam)

    # ---- slots ---------------------------------------------------------------------------------------------------

    def _meet(self, sequence: Sequence, index: int) -> None:
        self.sequences.append(sequence)
        self._index[sequence] = index
        self._device_tokens[sequence] = list(sequence.token_ids)

    def _chain(self, sequence: Sequence, token_ids: list[int]) -> list[Prefix]:
        """The prefixes that these tokens end, of length 1, 2 and so on."""
        chain: list[Prefix] = []
        prefix: Any = (sequence.cache_salt,)
        for token in token_ids:
            prefix = self._prefixes.setdefault((prefix, token), len(self._prefixes))
            chain.append(prefix)
        return chain

    def _block(self, block: int) -> list[Prefix]:
        return self._gpu.setdefault(block, [None] * self._size)

    def _write(self, table: list[int], position: int, content: Prefix) -> None:
        self._block(table[position // self._size])[position % self._size] = content


def like(sequence: Sequence, token_ids: list[int]) -> Sequence:
    """A sequence of the same request."""
    return Sequence(
        sequence.request_id,
        token_ids,
        sequence.num_prompt_tokens,
        sequence.max_length,
        priority=sequence.priority,
        caller=sequence.caller,
        cache_salt=sequence.cache_salt,
        reads_prefix_cache=sequence.reads_prefix_cache,
        decides_late=sequence.decides_late,
    )


def make_scheduler(block_size: int, num_blocks: int, num_cpu_blocks: int, **options: Any) -> Scheduler:
    """A scheduler whose sequences may fill its whole pool."""
    return Scheduler(
        max_model_len=block_size * num_blocks,
        block_size=block_size,
        block_manager=BlockManager(block_size, num_blocks, num_cpu_blocks),
        **options,
    )
