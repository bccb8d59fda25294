"""The scheduler alone, with a stand-in for the model: tokens are a function of the tokens before them."""

import random
import subprocess
import sys
from collections.abc import Iterable

import pytest

from mini_infer.exceptions import InvalidConfigError
from mini_infer.memory import BlockManager
from mini_infer.scheduler import (
    PreemptionCosts,
    PriorityFirst,
    Scheduler,
    SchedulerOutputs,
    Sequence,
    SequenceStatus,
)


def sequence(name: str, num_prompt: int, num_output: int, **options: object) -> Sequence:
    return Sequence(name, list(range(num_prompt)), num_prompt, num_prompt + num_output, **options)  # type: ignore[arg-type]


def next_tokens(plan: SchedulerOutputs) -> list[int]:
    return [hash(tuple(s.sequence.token_ids)) % 1000 for s in plan.scheduled if s.samples]


def run(scheduler: Scheduler) -> Iterable[SchedulerOutputs]:
    while not scheduler.is_finished():
        plan = scheduler.schedule()
        yield plan
        scheduler.update(plan, next_tokens(plan))


def names(plan: SchedulerOutputs) -> list[tuple[str, int]]:
    return [(s.request_id, n) for s, n in plan.scheduled]


def test_runs_in_a_process_that_never_imports_torch() -> None:
    code = (
        "import sys\n"
        "from mini_infer.scheduler import Scheduler\n"
        "from mini_infer.memory import BlockManager\n"
        "scheduler = Scheduler(max_num_seqs=64, max_model_len=2048, block_size=16)\n"
        "assert scheduler.schedule().scheduled == []\n"
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
    scheduler = Scheduler(8, 1000, 4, max_num_batched_tokens=10, block_manager=BlockManager(4, 12), watermark=0)
    long, short = sequence("long", 30, 10), sequence("short", 2, 5)
    scheduler.running += [long, short]  # as after a preemption of "long", which came first
    for running in (long, short):
        running.status = SequenceStatus.RUNNING
    short.num_computed_tokens = 1
    assert names(scheduler.schedule()) == [("short", 1), ("long", 9)]


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
    for _ in run(scheduler):
        at_stage = {
            "waiting": target.status is SequenceStatus.WAITING,
            "chunk": 0 < target.num_computed_tokens < 12,
            "decode": len(target) > 14,
        }
        if at_stage[stage]:
            break
    scheduler.finish(target, "abort")
    assert target.finish_reason == "abort" and target not in scheduler.running
    list(run(scheduler))
    assert scheduler.block_manager.num_used_blocks == 0


def test_stop_tokens_count_only_after_min_length() -> None:
    stopping = Sequence("s", [7, 7], 2, 20, min_length=4, stop_token_ids=frozenset({7}))
    lengths = []
    while (reason := stopping.reason_to_finish()) is None:
        lengths.append(len(stopping))
        stopping.token_ids.append(7)
    assert (reason, lengths) == ("stop", [2, 3, 4])


def test_a_sequence_without_room_computes_its_prompt_and_samples_nothing() -> None:
    scheduler = Scheduler(4, 10, 4, max_num_batched_tokens=4)
    only_prompt = sequence("p", 10, 0)
    scheduler.add(only_prompt)
    plans = list(run(scheduler))
    assert [plan.num_tokens for plan in plans] == [4, 4, 2]
    assert not any(item.samples for plan in plans for item in plan.scheduled)
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
        counts = [n for _, n in plan.scheduled]
        assert counts == sorted(counts, key=lambda n: n > 1), "decodes first"
        for item, n in plan.scheduled:
            assert 0 < n <= item.num_uncomputed_tokens
            assert len(item.block_table) * block_size >= item.num_computed_tokens + n
        owned = [block for item in scheduler.running for block in item.block_table]
        assert len(owned) == len(set(owned)) == blocks.num_used_blocks
        scheduler.update(plan, next_tokens(plan))
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
            if plan.preempted:
                assert bool(plan.swap_out) == swaps
                break
        list(run(scheduler))
        assert (scheduler.counts.num_swapped > 0) == swaps == (scheduler.counts.num_recomputed == 0)


def test_forks_take_seats_that_were_kept_for_them() -> None:
    scheduler = Scheduler(4, 100, 4)
    parent = sequence("parent", 6, 5, num_forks=2)
    scheduler.add(parent)
    scheduler.add(sequence("one", 4, 5))
    scheduler.add(sequence("two", 4, 5))
    plan = scheduler.schedule()
    assert names(plan) == [("parent", 6), ("one", 4)]
    scheduler.advance(plan)
    for _ in range(2):
        scheduler.fork(parent, Sequence("parent", list(parent.token_ids), 6, 11))
    scheduler.append(parent, 0)
    for child in scheduler.running[-2:]:
        scheduler.append(child, 1)
    assert scheduler.block_manager.num_used_blocks == 3  # two of the prompt, which all three hold, and one of "one"
    copies = scheduler.schedule().copy
    assert len(copies) == 2 and len({source for source, _ in copies}) == 1  # the last holder writes in place
