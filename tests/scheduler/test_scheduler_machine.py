"""Hypothesis drives the scheduler through whatever it can think of; ``kv_model`` says whether it was right."""

from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="property tests need hypothesis")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from mini_infer.scheduler import FirstComeFirstServed, PreemptionCosts, PriorityFirst, Sequence, SequenceStatus
from tests.scheduler.kv_model import NUM_TOKENS, KVModel, Search, like, make_scheduler


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps, failures and aborts in any order, on pools so small that something always has to give."""

    model: KVModel

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 8]),
        num_blocks=st.integers(4, 40),
        num_cpu_blocks=st.sampled_from([0, 5, 40]),
        max_num_seqs=st.integers(1, 8),
        budget=st.integers(1, 40),
        watermark=st.sampled_from([0.0, 0.01, 0.3]),
        policy=st.sampled_from([FirstComeFirstServed(), PriorityFirst(3)]),
        prefix_caching=st.booleans(),
        mode=st.sampled_from(["recompute", "swap", "auto"]),
        seconds_per_block=st.sampled_from([1.0, 10.0]),
        fair_size=st.sampled_from([1, 2, 32]),
        depth=st.integers(1, 4),
        draft_rate=st.sampled_from([0.0, 0.5, 1.0]),
        seed=st.integers(0, 1000),
    )
    def start(
        self,
        block_size: int,
        num_blocks: int,
        num_cpu_blocks: int,
        max_num_seqs: int,
        budget: int,
        watermark: float,
        policy: Any,
        prefix_caching: bool,
        mode: str,
        seconds_per_block: float,
        fair_size: int,
        depth: int,
        draft_rate: float,
        seed: int,
    ) -> None:
        scheduler = make_scheduler(
            block_size,
            num_blocks,
            num_cpu_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            watermark=watermark,
            policy=policy,
            prefix_caching=prefix_caching,
            preemption_mode=mode,
            costs=PreemptionCosts(seconds_per_block, 1.0),
            fair_size=fair_size,
        )
        self.model = KVModel(scheduler, depth, draft_rate, seed)

    @rule(
        data=st.data(),
        num_output=st.integers(0, 10),
        priority=st.integers(-2, 2),
        salt=st.sampled_from([None, None, "salt"]),
        kind=st.sampled_from(["sampled", "sampled", "refined", "beams"]),
        num_others=st.sampled_from([0, 0, 1, 2]),
        reads=st.sampled_from([True, True, True, False]),
        caller=st.sampled_from([None, "a", "a", "b", "c"]),
    )
    def arrive(
        self,
        data: st.DataObject,
        num_output: int,
        priority: int,
        salt: str | None,
        kind: str,
        num_others: int,
        reads: bool,
        caller: str | None,
    ) -> None:
        scheduler = self.model.scheduler
        num_prompt = data.draw(st.integers(1, max(1, scheduler.max_model_len - 1)))
        max_length = min(scheduler.max_model_len, num_prompt + num_output)
        # All prompts are the same tokens up to a point of their own, so that prefixes are shared and then diverge.
        shared = data.draw(st.integers(0, num_prompt))
        other = data.draw(st.integers(0, NUM_TOKENS - 1))
        sequence = Sequence(
            str(len(self.model.sequences)),
            [i % NUM_TOKENS for i in range(shared)] + [other] * (num_prompt - shared),
            num_prompt,
            max_length,
            priority=priority,
            caller=caller,
            cache_salt=salt,
            reads_prefix_cache=reads,
            decides_late=kind != "sampled",
        )
        if max_length > num_prompt:
            sequence.num_seats = 1 + min(num_others, scheduler.max_num_seqs - 1)
        if kind == "beams" and max_length > num_prompt:
            self.model.add(sequence, Search(list(sequence.token_ids), max_length, sequence.num_seats))
        else:
            sequence.forks = tuple(like(sequence, list(sequence.token_ids)) for _ in range(sequence.num_seats - 1))
            self.model.add(sequence)

    @precondition(lambda self: not self.model.is_finished())
    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.model.step()

    @precondition(lambda self: len(self.model.flights) < self.model.depth)
    @rule()
    def plan(self) -> None:
        self.model.plan()

    @precondition(lambda self: self.model.flights)
    @rule()
    def complete(self) -> None:
        self.model.complete()

    @precondition(lambda self: self.model.flights)
    @rule()
    def fail(self) -> None:
        self.model.fail()

    @precondition(lambda self: not self.model.is_finished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        going_on = [s for s in self.model.sequences if s.status not in (SequenceStatus.NEW, SequenceStatus.FINISHED)]
        self.model.abort(going_on[data.draw(st.integers(0, len(going_on) - 1))])

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        # Bounded: if someone starved or the pools deadlocked, this would go on for ever.
        for _ in range(sum(20 * sequence.max_length for sequence in self.model.sequences)):
            if self.model.is_finished():
                break
            self.model.step()
        while self.model.flights:
            self.model.complete()
        self.model.check_finished()


def check(num_examples: int) -> None:
    options = settings(
        max_examples=num_examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(SchedulerMachine, settings=options)


def test_scheduler_is_lossless_under_any_sequence_of_events() -> None:
    check(200)  # some thousands of sequences


@pytest.mark.slow
def test_scheduler_is_lossless_under_very_many_sequences_of_events() -> None:
    check(1500)  # more than 10,000 sequences
