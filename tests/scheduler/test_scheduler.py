"""The scheduler alone, with a stand-in for the model: tokens are a function of the tokens before them."""

import dataclasses
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mini_infer.config import PreemptionMode
from mini_infer.exceptions import InvalidConfigError
from mini_infer.memory import BlockManager
from mini_infer.scheduler import (
    Outcome,
    PreemptionCosts,
    PriorityFirst,
    Scheduler,
    SchedulerOutputs,
    Sequence,
    SequenceStatus,
)


def sequence(name: str, num_prompt: int, num_output: int, **options: Any) -> Sequence:
    return Sequence(name, list(range(num_prompt)), num_prompt, num_prompt + num_output, **options)


def outcomes(plan: SchedulerOutputs) -> list[Outcome]:
    """One token for everyone who samples, a function of those before it."""
    result = []
    for item in plan.scheduled:
        if item.num_logits:
            token = hash(tuple(item.sequence.token_ids[: item.end])) % 1000
            result += [Outcome(one, (token,), item.end) for one in (item.sequence, *item.forks)]
        elif item.end == item.sequence.max_length:
            result.append(Outcome(item.sequence, (), item.end))
    return result


def run(scheduler: Scheduler) -> Iterator[SchedulerOutputs]:
    for _ in range(10_000):
        if scheduler.is_finished():
            return
        plan = scheduler.schedule()
        yield plan
        scheduler.commit(outcomes(plan))
    raise AssertionError("it does not end")


def step(scheduler: Scheduler) -> SchedulerOutputs:
    plan = scheduler.schedule()
    scheduler.commit(outcomes(plan))
    return plan


def names(plan: SchedulerOutputs) -> list[tuple[str, int]]:
    return [(item.sequence.request_id, item.num_tokens) for item in plan.scheduled]


def state(scheduler: Scheduler, *sequences: Sequence) -> object:
    """All that a scheduler and its sequences say of themselves."""
    manager = scheduler.block_manager
    return (
        [dataclasses.replace(one, token_ids=list(one.token_ids)).__repr__() for one in sequences],
        list(scheduler.running),
        set(scheduler.waiting),
        (manager.num_free_blocks, manager.cached_blocks, manager.num_free_cpu_blocks),
    )


def test_runs_in_a_process_that_never_imports_torch() -> None:
    code = (
        "import sys\n"
        "from mini_infer.scheduler import Scheduler\n"
        "from mini_infer.memory import BlockManager\n"
        "scheduler = Scheduler(max_num_seqs=64, max_model_len=2048, block_size=16)\n"
        "assert scheduler.schedule().scheduled == ()\n"
        "blocks = BlockManager(block_size=16, num_gpu_blocks=1024, num_cpu_blocks=256)\n"
        "blocks.free(blocks.allocate(num_blocks=4))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decodes_go_before_prompt_chunks_and_fill_the_budget() -> None:
    scheduler = Scheduler(8, 1000, 4, max_num_batched_tokens=10)
    scheduler.add(sequence("a", 3, 50))
    scheduler.add(sequence("b", 25, 50))  # chunks of 7, 9 and 9
    plans = run(scheduler)
    assert names(next(plans)) == [("a", 3), ("b", 7)]
    assert names(next(plans)) == [("a", 1), ("b", 9)]
    assert names(next(plans)) == [("a", 1), ("b", 9)]
    assert names(next(plans)) == [("a", 1), ("b", 1)]


def test_a_decode_is_not_starved_by_an_older_long_prompt() -> None:
    scheduler = Scheduler(8, 1000, 4, max_num_batched_tokens=10, policy=PriorityFirst())
    short = sequence("short", 2, 50)
    scheduler.add(short)
    step(scheduler)
    scheduler.add(sequence("long", 30, 10, priority=1))  # it goes before "short" in everything but this
    for _ in range(3):
        assert names(step(scheduler)) == [("short", 1), ("long", 9)]
    assert [s.request_id for s in scheduler.running] == ["long", "short"]


def test_first_come_first_served() -> None:
    scheduler = Scheduler(2, 100, 4)
    for name in "abcd":
        scheduler.add(sequence(name, 4, 3))
    seen = []
    for plan in run(scheduler):
        seen += [name for name, _ in names(plan) if name not in seen]
    assert seen == list("abcd")


def test_preempts_the_youngest_and_brings_it_back_first() -> None:
    blocks = BlockManager(4, 4)
    scheduler = Scheduler(8, 16, 4, block_manager=blocks, watermark=0)
    scheduler.add(sequence("old", 8, 8))
    scheduler.add(sequence("young", 8, 8))
    scheduler.add(sequence("waiting", 4, 8))
    plans = run(scheduler)
    assert names(next(plans)) == [("old", 8), ("young", 8)]
    plan = next(plans)  # old needs a third block, and there is none
    assert names(plan) == [("old", 1)]
    assert [s.request_id for s in plan.preempted] == ["young"]
    young = plan.preempted[0]
    assert (young.status, young.block_table, young.num_computed_tokens) == (SequenceStatus.WAITING, [], 0)
    assert len(young) == 9  # the token it had is kept
    order = [name for plan in plans for name, n in names(plan) if n > 1]
    assert order[:2] == ["young", "waiting"]
    assert young.num_preemptions >= 1


def test_admission_leaves_the_watermark_free() -> None:
    scheduler = Scheduler(8, 40, 4, block_manager=BlockManager(4, 10), watermark=0.2)
    scheduler.add(sequence("a", 16, 4))
    scheduler.add(sequence("b", 17, 3))  # 5 blocks: with a's 4, that leaves 1 of the 2 to keep free
    assert names(scheduler.schedule()) == [("a", 16)]


@pytest.mark.parametrize("stage", ["waiting", "chunk", "decode"])
def test_finish_at_any_stage_frees_everything(stage: str) -> None:
    scheduler = Scheduler(1, 100, 4, max_num_batched_tokens=5)
    scheduler.add(sequence("other", 4, 2))
    target = sequence("target", 12, 50)
    scheduler.add(target)
    for plan in run(scheduler):
        at_stage = {
            "waiting": target.status is SequenceStatus.WAITING,
            "chunk": 0 < target.num_computed_tokens < 12,
            "decode": len(target) > 14,
        }
        if at_stage[stage]:
            scheduler.finish(target, "abort")
            scheduler.commit(outcomes(plan))
            break
    assert target.finish_reason == "abort" and target not in scheduler.running
    list(run(scheduler))
    assert scheduler.block_manager.num_used_blocks == 0


def test_a_sequence_without_room_computes_its_prompt_and_samples_nothing() -> None:
    scheduler = Scheduler(4, 10, 4, max_num_batched_tokens=4)
    only_prompt = sequence("p", 10, 0)
    scheduler.add(only_prompt)
    plans = list(run(scheduler))
    assert [plan.num_tokens for plan in plans] == [4, 4, 2]
    assert not any(item.num_logits for plan in plans for item in plan.scheduled)
    assert only_prompt.finish_reason == "length" and len(only_prompt) == 10


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"block_size": 1.5}, "block_size"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"watermark": 2}, "watermark"),
        ({"block_manager": BlockManager(8, 4)}, "block manager's is 8"),
    ],
)
def test_bad_configuration(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidConfigError, match=complaint):
        Scheduler(**{"max_num_seqs": 4, "max_model_len": 64, "block_size": 16, **options})  # type: ignore[arg-type]


def test_refuses_a_sequence_that_would_block_the_queue_for_ever() -> None:
    with pytest.raises(InvalidConfigError, match="max_length"):
        Scheduler(4, 1000, 4, block_manager=BlockManager(4, 10)).add(sequence("s", 30, 11))


@pytest.mark.parametrize("seed", range(150))
def test_whatever_the_pressure_every_sequence_gets_the_tokens_it_would_get_alone(seed: int) -> None:
    draw = random.Random(seed)
    block_size, num_blocks = draw.choice([1, 2, 4, 16]), draw.randint(4, 40)
    capacity = block_size * num_blocks
    blocks = BlockManager(block_size, num_blocks)
    scheduler = Scheduler(
        draw.randint(1, 8),
        capacity,
        block_size,
        max_num_batched_tokens=draw.randint(1, 20),
        block_manager=blocks,
        watermark=draw.choice([0, 0.01, 0.3]),
    )
    arriving = []
    for number in range(draw.randint(1, 20)):
        num_prompt = draw.randint(1, capacity)
        arriving.append(sequence(str(number), num_prompt, min(capacity - num_prompt, draw.randint(0, 10))))
    everyone, aborted = list(arriving), set()
    while arriving or not scheduler.is_finished():
        while arriving and (scheduler.is_finished() or draw.random() < 0.3):
            scheduler.add(arriving.pop(0))
        plan = scheduler.schedule()
        assert plan.scheduled, "a step without work would never end"
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        counts = [item.num_tokens for item in plan.scheduled]
        assert counts == sorted(counts, key=lambda n: n > 1), "decodes first"
        for planned in plan.scheduled:
            assert planned.num_tokens > 0 and len(planned.sequence.block_table) * block_size >= planned.end
        owned = [block for item in scheduler.running for block in item.block_table]
        assert len(owned) == len(set(owned)) == blocks.num_used_blocks
        scheduler.commit(outcomes(plan))
        if draw.random() < 0.02 and scheduler.running:
            victim = draw.choice(scheduler.running)
            scheduler.finish(victim, "abort")
            aborted.add(victim)
    assert blocks.num_used_blocks == 0
    for item in everyone:
        alone = list(range(item.num_prompt_tokens))
        while len(alone) < len(item):
            alone.append(hash(tuple(alone)) % 1000)
        assert item.token_ids == alone
        assert item in aborted or len(item) == item.max_length


def test_sequences_of_other_salts_share_nothing() -> None:
    scheduler = Scheduler(8, 100, 4, prefix_caching=True)
    for name, salt in (("a", "x"), ("b", None), ("c", "x")):
        scheduler.add(sequence(name, 20, 5, cache_salt=salt))
    # "c" shares four of its five blocks with "a" in the very step that computes them; the last token is its own.
    assert dict(names(scheduler.schedule())) == {"a": 20, "b": 20, "c": 4}


def test_a_sequence_that_does_not_read_the_prefix_cache_computes_all_its_tokens() -> None:
    scheduler = Scheduler(4, 100, 4, prefix_caching=True)
    for name, reads in (("a", True), ("b", False), ("c", True)):
        scheduler.add(sequence(name, 9, 1, reads_prefix_cache=reads))
    assert dict(names(scheduler.schedule())) == {"a": 9, "b": 9, "c": 1}
    assert (scheduler.counts.num_prefix_queries, scheduler.counts.num_prefix_hits) == (18, 8)


def test_blocks_that_somebody_holds_cost_nothing_to_share() -> None:
    scheduler = Scheduler(4, 16, 4, block_manager=BlockManager(4, 4), watermark=0, prefix_caching=True)
    scheduler.add(sequence("a", 8, 3))
    step(scheduler)
    scheduler.add(sequence("b", 9, 1))
    assert names(scheduler.schedule()) == [("a", 1), ("b", 1)]  # one block is left, and "b" needs no other


def test_blocks_that_others_hold_are_swapped_out_too_if_they_could_not_be_found_again() -> None:
    blocks = BlockManager(4, 4, num_cpu_blocks=4)
    scheduler = Scheduler(4, 16, 4, block_manager=blocks, watermark=0, preemption_mode="swap")
    fork = sequence("fork", 8, 8)
    parent = sequence("parent", 8, 8, forks=(fork,), num_seats=2)
    scheduler.add(parent)
    for _ in range(5):
        step(scheduler)
    assert blocks.num_used_blocks == 4  # the prompt's two, which both hold, and one for each
    plan = step(scheduler)
    assert plan.preempted == (fork,) and len(plan.swap_out) == 3
    scheduler.finish(parent, "abort")
    plan = scheduler.schedule()
    assert names(plan) == [("fork", 1)] and len(plan.swap_in) == 3


def test_what_was_swapped_out_is_of_no_use_behind_a_gap() -> None:
    blocks = BlockManager(4, 4, num_cpu_blocks=4)
    scheduler = Scheduler(
        4, 16, 4, block_manager=blocks, watermark=0, prefix_caching=True, preemption_mode="swap", policy=PriorityFirst()
    )
    old, young = sequence("old", 8, 8), sequence("young", 8, 8)
    scheduler.add(old)
    scheduler.add(young)
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == (young,) and len(plan.swap_out) == 1  # the first block stays, since "old" holds it too
    scheduler.finish(old, "abort")
    other = Sequence("other", [7] * 16, 16, 16, priority=1)  # it takes all blocks
    scheduler.add(other)
    assert names(step(scheduler)) == [("other", 16)] and other.finish_reason == "length"
    plan = scheduler.schedule()
    assert names(plan) == [("young", 9)] and not plan.swap_in and blocks.num_free_cpu_blocks == 4


def test_higher_priority_first_but_nobody_waits_for_ever() -> None:
    scheduler = Scheduler(1, 100, 4, policy=PriorityFirst(ageing=10))
    scheduler.add(sequence("humble", 4, 1))
    for number in range(40):
        scheduler.add(sequence(f"urgent-{number}", 4, 1, priority=2))
    order = [name for plan in run(scheduler) for name, _ in names(plan)]
    assert order[0] == "urgent-0"
    assert order.index("humble") == 19  # arrivals 1 to 19 outweigh it by their two levels; the 20th no more
    urgent = [name for name in order if name != "humble"]
    assert urgent == sorted(urgent, key=lambda name: int(name.split("-")[1]))


def test_a_reader_can_write_a_policy() -> None:
    class ShortestFirst:
        def key(self, sequence: Sequence) -> tuple[float, ...]:
            return (len(sequence),)

    scheduler = Scheduler(1, 100, 4, policy=ShortestFirst())
    for name, length in (("long", 9), ("short", 2), ("middle", 5), ("short too", 2)):
        scheduler.add(sequence(name, length, 1))
    assert [name for plan in run(scheduler) for name, _ in names(plan)] == ["short", "short too", "middle", "long"]


def test_auto_swaps_only_where_that_is_cheaper() -> None:
    for seconds_per_block, swaps in ((1.0, True), (100.0, False)):
        blocks = BlockManager(4, 4, num_cpu_blocks=4)
        costs = PreemptionCosts(seconds_per_block, seconds_per_recomputed_token=1.0)
        scheduler = Scheduler(8, 16, 4, block_manager=blocks, watermark=0, preemption_mode="auto", costs=costs)
        scheduler.add(sequence("old", 8, 8))
        scheduler.add(sequence("young", 8, 8))
        for plan in run(scheduler):
            assert bool(plan.swap_out) == (swaps and bool(plan.preempted))
        assert (scheduler.counts.num_swap_preemptions > 0) == swaps == (scheduler.counts.num_recompute_preemptions == 0)


def test_forks_take_seats_that_were_kept_for_them() -> None:
    scheduler = Scheduler(4, 100, 4)
    forks = (sequence("first", 6, 5), sequence("second", 6, 5))
    parent = sequence("parent", 6, 5, forks=forks, num_seats=3)
    scheduler.add(parent)
    scheduler.add(sequence("one", 4, 5))
    scheduler.add(sequence("two", 4, 5))
    plan = scheduler.schedule()
    assert names(plan) == [("parent", 6), ("one", 4)] and plan.scheduled[0].forks == forks
    assert {s.request_id for s in scheduler.running} == {"parent", "one", "first", "second"}
    assert parent.num_seats == 1 and parent.forks == ()
    scheduler.commit(Outcome(s, (token,), 6) for token, s in enumerate((parent, *forks)))
    scheduler.commit(outcomes(plan)[-1:])
    assert scheduler.block_manager.num_used_blocks == 3  # two of the prompt, which all three hold, and one of "one"
    copies = scheduler.schedule().copy
    assert len(copies) == 2 and len({source for source, _ in copies}) == 1  # the last holder writes in place


# ---- steps under way ---------------------------------------------------------------------------------------------


def test_the_next_step_is_planned_while_one_is_under_way() -> None:
    scheduler = Scheduler(4, 100, 4)
    one = sequence("s", 5, 3)
    scheduler.add(one)
    plans = [scheduler.schedule() for _ in range(4)]
    assert [names(plan) for plan in plans] == [[("s", 5)], [("s", 1)], [("s", 1)], []]  # the last token is not computed
    assert [(item.start, item.is_decode) for plan in plans for item in plan.scheduled] == [
        (0, False),
        (5, True),
        (6, True),
    ]
    assert one.token_ids[5:] == [-1, -1, -1] and one.generated_token_ids == []
    for token, plan in enumerate(plans[:3], 7):
        scheduler.commit([Outcome(one, (token,), plan.scheduled[0].end)])
    assert one.generated_token_ids == [7, 8, 9] and one.finish_reason == "length"


def test_a_plan_is_empty_while_all_that_could_be_computed_is_under_way() -> None:
    scheduler = Scheduler(4, 100, 4)
    late, one = sequence("late", 4, 4, decides_late=True), sequence("one", 4, 1)
    scheduler.add(late)
    scheduler.add(one)
    plan = scheduler.schedule()
    assert names(plan) == [("late", 4), ("one", 4)]
    assert scheduler.schedule() == SchedulerOutputs() and not scheduler.is_finished()
    scheduler.commit([Outcome(late, (1, 2), 4), Outcome(one, (3,), 4)])
    assert names(scheduler.schedule()) == [("late", 2)] and one.finish_reason == "length"


def test_a_placeholder_is_not_remembered_before_its_token_is_known() -> None:
    scheduler = Scheduler(4, 100, 4, prefix_caching=True)
    one = sequence("s", 3, 20)
    scheduler.add(one)
    plans = [scheduler.schedule() for _ in range(3)]
    assert [len(plan.remembered) for plan in plans] == [0, 0, 0]  # the first block's last token is not known yet
    scheduler.commit([Outcome(one, (3,), 3)])
    assert len(scheduler.schedule().remembered) == 1
    match = scheduler.block_manager.match_prefix([0, 1, 2, 3], None, 1)
    assert match.blocks == one.block_table[:1]


@pytest.mark.parametrize("depth", [1, 3])
def test_rewinding_is_no_preemption_and_computes_all_of_it_again(depth: int) -> None:
    scheduler = Scheduler(4, 100, 4, prefix_caching=True, max_num_batched_tokens=6)
    one, prompt = sequence("one", 5, 9), sequence("prompt", 9, 0, cache_salt="x")
    scheduler.add(one)
    step(scheduler)
    scheduler.add(prompt)
    known = list(one.token_ids)
    plans = [scheduler.schedule() for _ in range(depth)]
    assert plans[0].remembered and set(names(plans[0])) == {("one", 1), ("prompt", 5)}
    scheduler.rewind(plans)
    assert one.token_ids == known and len(prompt) == 9
    assert set(scheduler.waiting) == {one, prompt} and scheduler.block_manager.num_used_blocks == 0
    assert (one.num_preemptions, scheduler.counts.num_recompute_preemptions, scheduler.counts.num_swap_preemptions) == (
        0,
        0,
        0,
    )
    assert scheduler.block_manager.match_prefix(list(range(8)), "x", 2).blocks == []
    list(run(scheduler))
    assert (one.finish_reason, prompt.finish_reason) == ("length", "length") and len(one) == 14


def test_rewinding_takes_back_what_was_to_be_swapped_out() -> None:
    blocks = BlockManager(4, 4, num_cpu_blocks=4)
    scheduler = Scheduler(4, 16, 4, block_manager=blocks, watermark=0, preemption_mode="swap")
    old, young = sequence("old", 8, 8), sequence("young", 8, 8)
    scheduler.add(old)
    scheduler.add(young)
    step(scheduler)
    plan = scheduler.schedule()
    assert plan.preempted == (young,) and len(plan.swap_out) == 2 and blocks.num_free_cpu_blocks == 2
    scheduler.rewind([plan])
    assert blocks.num_free_cpu_blocks == 4
    scheduler.finish(old, "abort")
    plan = scheduler.schedule()  # the copies were never made
    assert names(plan) == [("young", 9)] and not plan.swap_in


def test_rewinding_takes_back_forks() -> None:
    scheduler = Scheduler(4, 100, 4)
    fork = sequence("fork", 6, 5)
    parent = sequence("parent", 6, 5, forks=(fork,), num_seats=2)
    scheduler.add(parent)
    scheduler.rewind([scheduler.schedule()])
    assert set(scheduler.waiting) == {parent, fork} and (len(parent), len(fork)) == (6, 6)
    assert names(scheduler.schedule()) == [("parent", 6), ("fork", 6)]


def test_a_prompt_that_nothing_is_to_follow_is_computed_again_although_it_lost_its_blocks_too() -> None:
    scheduler = Scheduler(4, 16, 4, block_manager=BlockManager(4, 4), watermark=0)
    old, prompt = sequence("old", 8, 8), sequence("prompt", 8, 0)
    scheduler.add(old)
    scheduler.add(prompt)
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert plans[1].preempted == (prompt,) and prompt.status is SequenceStatus.RESTING
    scheduler.rewind(plans)
    list(run(scheduler))
    assert prompt.finish_reason == "length"


def test_a_sequence_preempted_under_a_step_goes_on_with_the_token_that_it_brings() -> None:
    scheduler = Scheduler(4, 16, 4, block_manager=BlockManager(4, 4), watermark=0)
    old, young = sequence("old", 8, 8), sequence("young", 8, 8)
    scheduler.add(old)
    scheduler.add(young)
    _, second = scheduler.schedule(), scheduler.schedule()
    assert second.preempted == (young,)
    assert young.status is SequenceStatus.RESTING and young.num_placeholders == 1 and not scheduler.waiting
    scheduler.commit([Outcome(old, (1,), 8), Outcome(young, (2,), 8)])
    assert list(scheduler.waiting) == [young] and young.generated_token_ids == [2]
    scheduler.commit([Outcome(old, (1,), 9)])
    list(run(scheduler))
    assert young.finish_reason == old.finish_reason == "length"


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_beam_whose_logits_came_after_its_preemption_rests_until_it_gets_a_token(mode: PreemptionMode) -> None:
    blocks = BlockManager(4, 4, num_cpu_blocks=4)
    scheduler = Scheduler(4, 16, 4, block_manager=blocks, watermark=0, preemption_mode=mode)
    old, beam = sequence("old", 8, 8), sequence("beam", 8, 8, decides_late=True)
    scheduler.add(old)
    scheduler.add(beam)
    assert [scheduler.schedule().preempted for _ in range(2)] == [(), (beam,)]
    scheduler.commit([Outcome(old, (1,), 8), Outcome(beam, (), 8)])
    assert beam.status is SequenceStatus.RESTING  # nothing of it is left to compute
    scheduler.finish(old, "abort")
    assert scheduler.schedule() == SchedulerOutputs()
    scheduler.commit([Outcome(beam, (5,), 8)])
    assert names(scheduler.schedule()) == [("beam", 1 if mode == "swap" else 9)]


def test_a_sequence_that_waits_again_has_one_entry_in_the_queue() -> None:
    scheduler = Scheduler(4, 16, 4)
    one, other = sequence("one", 4, 4), sequence("other", 4, 4)
    scheduler.add(one)
    scheduler.add(other)
    for _ in range(3):
        plans = [scheduler.schedule(), scheduler.schedule()]
        scheduler.rewind(plans)
        assert len(scheduler.waiting) == 2 and sorted(s.request_id for s in scheduler.waiting) == ["one", "other"]
    assert names(scheduler.schedule()) == [("one", 4), ("other", 4)]
    assert len(scheduler.waiting) == 0
    scheduler.finish(one, "abort")
    assert names(scheduler.schedule()) == [("other", 1)]


# ---- what came of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_ids", "num_valid"), [((1, 2), 4), ((1,), 6), ((1,), -1)], ids=["more than sampled", "too valid", "negative"]
)
def test_a_commit_is_all_or_nothing(token_ids: tuple[int, ...], num_valid: int) -> None:
    scheduler = Scheduler(8, 100, 4)
    everyone = [sequence(name, 4, 4) for name in "abc"]
    for one in everyone:
        scheduler.add(one)
    scheduler.schedule()
    a, b, c = everyone
    before = state(scheduler, *everyone)
    with pytest.raises(ValueError, match="sequence 'b' cannot go on"):
        scheduler.commit([Outcome(a, (1,), 4, "stop"), Outcome(b, token_ids, num_valid), Outcome(c, (1,), 4)])
    assert state(scheduler, *everyone) == before
    scheduler.commit([Outcome(a, (1,), 4, "stop"), Outcome(b, (1,), 4), Outcome(c, (1,), 4)])
    assert [len(one) for one in everyone] == [5, 5, 5] and a.finish_reason == "stop"


def test_a_sequence_has_one_outcome_and_only_if_a_step_is_under_way() -> None:
    scheduler = Scheduler(8, 100, 4, prefix_caching=True)
    one, late = sequence("one", 4, 4), sequence("late", 4, 4, decides_late=True, cache_salt="x")
    scheduler.add(one)
    scheduler.add(late)
    plans = [scheduler.schedule(), scheduler.schedule()]  # two tokens of "one" are under way
    bad = [
        [Outcome(one, (1,), 4), Outcome(one, (2,), 5)],
        [Outcome(one, (1, 2), 5)],
        [Outcome(one, (), 4)],
    ]
    for outcomes_ in bad:
        before = state(scheduler, one, late)
        with pytest.raises(ValueError, match="cannot go on"):
            scheduler.commit(outcomes_)
        assert state(scheduler, one, late) == before
    scheduler.commit([Outcome(one, (1,), 4), Outcome(late, (1, 2), 4)])
    scheduler.commit([Outcome(one, (1,), 5)])
    assert len(plans) == 2 and one.num_placeholders == 0
    with pytest.raises(ValueError, match="'one' cannot go on by 1 tokens"):
        scheduler.commit([Outcome(one, (1,), 5)])
    scheduler.propose(one, [3])
    with pytest.raises(ValueError, match="'one' cannot go on by 1 tokens"):
        scheduler.commit([Outcome(one, (3,), 5)])
    scheduler.schedule()  # it lets others share the first block of "late"
    with pytest.raises(ValueError, match="'one' cannot go on by 3 tokens"):
        scheduler.commit([Outcome(one, (3, 4, 5), 7)])
    with pytest.raises(ValueError, match="'late' cannot go on by 1 tokens with 3 positions valid"):
        scheduler.commit([Outcome(late, (3,), 3)])
    scheduler.commit([Outcome(one, (3, 4), 7, "stop"), Outcome(late, (), 4)])


def test_what_comes_of_a_sequence_that_has_ended_is_passed_over() -> None:
    scheduler = Scheduler(8, 100, 4)
    one, other = sequence("one", 4, 4), sequence("other", 4, 4)
    scheduler.add(one)
    scheduler.add(other)
    plans = [scheduler.schedule(), scheduler.schedule()]
    scheduler.finish(one, "abort")
    for token, plan in enumerate(plans):
        scheduler.commit([Outcome(item.sequence, (token,), item.end) for item in plan.scheduled])
    assert one.generated_token_ids == [] and one.finish_reason == "abort"
    assert other.generated_token_ids == [0, 1]


def test_a_step_says_it_itself_whether_it_decodes() -> None:
    scheduler = Scheduler(4, 100, 4)
    one = sequence("s", 1, 5)
    scheduler.add(one)
    first = scheduler.schedule()
    assert names(first) == [("s", 1)] and not first.only_decodes  # a prompt of one token is a prompt
    scheduler.commit(outcomes(first))
    second = scheduler.schedule()
    assert second.only_decodes and not first.only_decodes


def test_the_prefix_hit_rate_counts_prompt_tokens_alone() -> None:
    scheduler = Scheduler(4, 100, 4, prefix_caching=True)
    one = sequence("s", 6, 20)
    scheduler.add(one)
    for _ in range(7):
        step(scheduler)
    plan = scheduler.schedule()
    scheduler.rewind([plan])  # it is admitted again with 13 tokens, of which 12 are cached
    plan = scheduler.schedule()
    assert names(plan) == [("s", 1)]
    assert (scheduler.counts.num_prefix_queries, scheduler.counts.num_prefix_hits) == (12, 6)


# ---- several tokens at once --------------------------------------------------------------------------------------


def drafting(num_blocks: int, *others: Sequence, **options: Any) -> tuple[Scheduler, Sequence]:
    """A sequence of 4 prompt tokens and a sampled one, which is to be computed."""
    scheduler = Scheduler(4, 4 * num_blocks, 4, block_manager=BlockManager(4, num_blocks, 8), watermark=0, **options)
    one = sequence("s", 4, 12)
    for each in (one, *others):
        scheduler.add(each)
    step(scheduler)
    return scheduler, one


def test_drafts_are_computed_with_the_token_before_them_and_those_accepted_stay() -> None:
    scheduler, one = drafting(8)
    known = list(one.token_ids)
    scheduler.propose(one, [1, 2, 3, 4, 5])
    plan = scheduler.schedule()
    (item,) = plan.scheduled
    assert (item.start, item.num_tokens, item.num_logits, item.is_decode) == (4, 6, 6, True) and plan.only_decodes
    assert len(one.block_table) == 3  # positions 4 to 9
    assert scheduler.schedule() == SchedulerOutputs()
    scheduler.commit([Outcome(one, (1, 2, 9), 7)])
    assert one.token_ids == [*known, 1, 2, 9] and one.num_computed_tokens == 7
    assert names(scheduler.schedule()) == [("s", 1)]


def test_nobody_is_preempted_for_a_guess() -> None:
    other = sequence("other", 8, 4)
    scheduler, one = drafting(4, other)  # the last block is for what both sample
    scheduler.propose(one, [1, 2, 3, 4, 5])
    scheduler.propose(other, [1, 2])
    plan = scheduler.schedule()
    assert names(plan) == [("s", 1)] and plan.preempted == (other,)
    # "s" had room for its token alone; "other" had to go for want of a block, not for anybody's drafts.
    scheduler, one = drafting(4, sequence("other", 6, 4))
    scheduler.propose(one, [1, 2, 3, 4, 5])
    plan = scheduler.schedule()
    assert names(plan) == [("s", 1), ("other", 1)] and not plan.preempted and one.num_drafts == 0


def test_drafts_give_their_blocks_back_before_anybody_is_preempted() -> None:
    other = sequence("other", 8, 4)
    scheduler, one = drafting(5, other, max_num_batched_tokens=12)
    scheduler.propose(one, [1, 2, 3, 4, 5])  # two blocks, which are all that are free, and "other" needs one
    plan = scheduler.schedule()
    assert names(plan) == [("s", 1), ("other", 1)] and not plan.preempted
    assert [item.num_logits for item in plan.scheduled] == [1, 1] and plan.num_tokens == 2
    assert (one.num_drafts, one.num_placeholders, len(one.block_table), len(other.block_table)) == (0, 1, 2, 3)


def test_drafts_take_the_budget_that_others_leave() -> None:
    scheduler, one = drafting(16, sequence("other", 4, 4), max_num_batched_tokens=8)
    scheduler.propose(one, [1] * 20)
    plan = scheduler.schedule()
    assert dict(names(plan)) == {"other": 1, "s": 7}


def test_drafts_are_never_cut_in_two_by_the_budget() -> None:
    scheduler = Scheduler(4, 40, 4, max_num_batched_tokens=4)
    late, one = sequence("late", 2, 12, decides_late=True), sequence("one", 2, 12)
    scheduler.add(late)
    scheduler.add(one)
    scheduler.schedule()
    scheduler.commit([Outcome(late, (1, 2, 3), 2), Outcome(one, (1,), 2)])
    scheduler.propose(one, [1, 2, 3])
    plan = scheduler.schedule()  # three tokens of "late" need a block, and leave room for one
    assert names(plan) == [("one", 1), ("late", 3)] and one.num_drafts == 0
    assert [item.num_logits for item in plan.scheduled] == [1, 1]


def test_several_tokens_that_came_at_once_get_the_blocks_that_they_need() -> None:
    scheduler = Scheduler(4, 16, 4, block_manager=BlockManager(4, 5), watermark=0)
    late, young = sequence("late", 4, 12, decides_late=True), sequence("young", 8, 8, decides_late=True)
    scheduler.add(late)
    scheduler.add(young)
    scheduler.schedule()
    scheduler.commit([Outcome(late, tuple(range(9)), 4), Outcome(young, tuple(range(8)), 8, "stop")])
    plan = scheduler.schedule()
    assert names(plan) == [("late", 9)] and len(late.block_table) == 4
    scheduler.commit([Outcome(late, (), 4)])  # nothing is settled: the same again
    assert names(scheduler.schedule()) == [("late", 9)]


def test_a_sequence_with_several_tokens_to_compute_is_not_stuck_where_others_hold_the_blocks() -> None:
    scheduler = Scheduler(4, 16, 4, block_manager=BlockManager(4, 4), watermark=0)
    old, young = (sequence(name, 8, 8, decides_late=True) for name in ("old", "young"))
    scheduler.add(old)
    scheduler.add(young)
    scheduler.schedule()
    scheduler.commit([Outcome(old, (1, 2, 3), 8), Outcome(young, (1, 2, 3), 8)])
    plan = scheduler.schedule()
    assert names(plan) == [("old", 3)] and plan.preempted == (young,)


def test_a_fork_leaves_the_blocks_of_drafts_behind() -> None:
    scheduler, one = drafting(8)
    one.decides_late = True
    scheduler.propose(one, [1, 2, 3, 4, 5, 6, 7])
    scheduler.schedule()
    scheduler.commit([Outcome(one, (1,), 5)])
    assert len(one.block_table) == 3  # it keeps them for its next tokens
    child = sequence("child", 4, 12)
    child.token_ids = [*one.token_ids[:5], 9]
    scheduler.fork(one, child)
    assert child.block_table == one.block_table[:2] and child.num_computed_tokens == 5
    plan = scheduler.schedule()
    assert dict(names(plan)) == {"s": 1, "child": 1} and len(plan.copy) == 1
    assert scheduler.block_manager.num_used_blocks == 4


def test_forks_start_from_what_is_sampled_and_so_are_given_no_drafts() -> None:
    scheduler = Scheduler(4, 100, 4, max_num_batched_tokens=4)
    parent = sequence("s", 5, 5, forks=(sequence("fork", 5, 5),), num_seats=2)
    scheduler.add(parent)
    step(scheduler)
    scheduler.propose(parent, [1, 2])
    (item,) = scheduler.schedule().scheduled
    assert (item.num_tokens, item.num_logits, len(item.forks)) == (1, 1, 1)
    assert item.forks[0].num_computed_tokens == 5


def test_swapping_in_after_a_part_of_the_drafts_was_accepted() -> None:
    scheduler = Scheduler(
        4, 16, 1, block_manager=BlockManager(1, 16, 16), watermark=0, preemption_mode="swap", policy=PriorityFirst()
    )
    one, other = sequence("s", 4, 12), sequence("other", 4, 12, priority=1)
    scheduler.add(one)
    scheduler.add(other)
    step(scheduler)
    scheduler.propose(one, [1, 2, 3, 4, 5])
    drafts = scheduler.schedule()
    assert drafts.scheduled[-1].num_tokens == 6  # with "other", all blocks but one
    after = [scheduler.schedule(), scheduler.schedule()]
    assert after[1].preempted == (one,) and len(after[1].swap_out) == 10
    by_name = {item.sequence.request_id: item for item in drafts.scheduled}
    scheduler.commit([Outcome(one, (1, 9), 6), Outcome(other, (7,), by_name["other"].end)])
    assert one.num_swapped_tokens == 6
    scheduler.finish(other, "abort")
    plan = scheduler.schedule()
    assert names(plan) == [("s", 1)] and plan.scheduled[0].start == 6 and len(plan.swap_in) == 6
    assert scheduler.block_manager.num_free_cpu_blocks == 16


def test_forks_of_a_late_sequence_for_whom_a_step_settles_nothing_are_computed_again() -> None:
    scheduler = Scheduler(4, 100, 4)
    fork = sequence("fork", 4, 12, decides_late=True)
    late = sequence("late", 4, 12, decides_late=True, forks=(fork,), num_seats=2)
    scheduler.add(late)
    scheduler.schedule()
    scheduler.commit([Outcome(late, (), 0), Outcome(fork, (), 0)])
    assert dict(names(scheduler.schedule())) == {"late": 4, "fork": 4}


def test_a_step_that_may_settle_nothing_lets_nobody_share_what_it_computes() -> None:
    scheduler = Scheduler(4, 100, 4, prefix_caching=True)
    late = sequence("late", 4, 12, decides_late=True)
    scheduler.add(late)
    assert scheduler.schedule().remembered == ()
    scheduler.commit([Outcome(late, (), 0)])  # its keys and values are not valid
    scheduler.add(sequence("other", 8, 1))
    assert dict(names(scheduler.schedule())) == {"late": 4, "other": 8}
    scheduler.commit([Outcome(late, (5,), 4)])
    assert scheduler.schedule().scheduled[0].start == 4
