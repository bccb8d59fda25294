"""No caller takes more than a share while others want something, too."""

import random
from collections import Counter
from collections.abc import Hashable

import pytest

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Outcome, Scheduler, Sequence, seats_for_one
from mini_infer.scheduler.shares import StepShares, fair_share, overdrawn_callers
from tests.scheduler.test_scheduler import sequence


def of(caller: Hashable, number: int, num_output: int = 30, num_prompt: int = 3) -> Sequence:
    one = sequence(f"{caller}-{number}", num_prompt, num_output)
    one.caller = caller
    return one


@pytest.mark.parametrize("seed", range(200))
def test_shares_are_max_min_fair(seed: int) -> None:
    """By the definition: the share is the largest integer that does not take more than there is."""
    rng = random.Random(seed)
    demands = [rng.randint(1, rng.choice([1, 3, 50, 300])) for _ in range(rng.randint(1, 40))]
    size = rng.randint(1, 500)
    share = fair_share(demands, size)
    taken = [sum(min(demand, most) for demand in demands) for most in (share, share + 1)]
    assert share >= 1 and (taken[0] <= size or share == 1)
    assert taken[1] > size or share >= max(demands), (demands, size)


@pytest.mark.parametrize("seed", range(20))
def test_everybody_has_its_turn(seed: int) -> None:
    """Callers with no more than the share are in every step, and the others' sequences take turns evenly."""
    rng = random.Random(seed)
    numbers = {name: rng.choice([1, 2, 9, 70]) for name in "abcde"[: rng.randint(2, 5)]}
    ready = [of(name, i) for name, number in numbers.items() for i in range(number)]
    rng.shuffle(ready)
    size = rng.randint(1, 40)
    shares = StepShares(size)
    share = fair_share(list(numbers.values()), size) if len(ready) > size else max(numbers.values())
    turns: Counter[Sequence] = Counter()
    num_steps = 100
    for _ in range(num_steps):
        chosen = shares.choose(ready, ())
        assert chosen == [one for one in ready if one in set(chosen)]
        assert Counter(one.caller for one in chosen) == {name: min(n, share) for name, n in numbers.items()}
        turns.update(chosen)
    for name, number in numbers.items():
        counts = [turns[one] for one in ready if one.caller == name]
        assert max(counts) - min(counts) <= 1 and sum(counts) == num_steps * min(number, share)


def test_alone_a_caller_has_the_whole_step() -> None:
    ready = [of("a", i) for i in range(64)]
    shares = StepShares(8)
    assert shares.choose(ready, ()) == shares.choose(ready, {"a"}) == ready
    assert len(shares.choose(ready, {"a", "b"})) == 7  # b is about to get its turn


def test_alone_a_caller_makes_no_step_too_long_for_the_next() -> None:
    """Its sequences take turns beyond eight times the fair size; those of a program of its own do not."""
    ready = [of("a", i) for i in range(100)]
    shares = StepShares(8)
    turns: Counter[Sequence] = Counter()
    for _ in range(100):
        chosen = shares.choose(ready, {"a"})
        assert len(chosen) == 64
        turns.update(chosen)
    assert set(turns.values()) == {64}
    own = [of(None, i) for i in range(100)]
    assert shares.choose(own, {None}) == shares.choose(own, ()) == own


def run_step(scheduler: Scheduler) -> Counter[Hashable]:
    plan = scheduler.schedule()
    scheduler.commit([Outcome(item.sequence, (7,), item.end) for item in plan.scheduled if item.num_logits])
    return Counter(item.sequence.caller for item in plan.scheduled)


def test_seats_are_left_for_who_has_none() -> None:
    scheduler = Scheduler(16, 40, 4, fair_size=4)
    for i in range(50):
        scheduler.add(of("many", i))
    run_step(scheduler)  # which begins as many of them as one step has room for
    assert run_step(scheduler) == {"many": seats_for_one(16)} == {"many": 14}
    scheduler.add(of("one", 0))
    assert run_step(scheduler) == {"many": 3, "one": 1}
    scheduler.add(of("one", 1))  # has a seat already
    assert run_step(scheduler) == {"many": 3, "one": 1}
    scheduler.add(of("other", 0))
    assert run_step(scheduler) == {"many": 2, "one": 1, "other": 1}


def test_those_of_nobody_may_fill_the_house() -> None:
    scheduler = Scheduler(16, 40, 4, fair_size=4)
    for i in range(50):
        scheduler.add(of(None, i))
    assert run_step(scheduler) == {None: 16} == run_step(scheduler)


def test_one_seat_is_nobodys_reserve() -> None:
    scheduler = Scheduler(1, 40, 4)
    scheduler.add(of("many", 0, num_output=1))
    scheduler.add(of("many", 1, num_output=1))
    assert [run_step(scheduler) for _ in range(3)] == [{"many": 1}, {"many": 1}, {}]
    assert scheduler.is_finished()


# ---- blocks ----------------------------------------------------------------------------------------------------------


def full_house(num_blocks: int) -> Scheduler:
    """Somebody's sequences hold all blocks, and more of them wait."""
    scheduler = Scheduler(64, 40, 1, fair_size=64, block_manager=BlockManager(1, num_blocks))
    for i in range(40):
        scheduler.add(of("many", i))
    while scheduler.block_manager.num_available_blocks > 1:
        run_step(scheduler)
    return scheduler


@pytest.mark.parametrize("num_prompt", [1, 3, 20, 24])
def test_a_newcomer_does_not_wait_for_others_blocks(num_prompt: int) -> None:
    """Its prompt begins in the very next step, and it is never preempted for those who hold more than their share."""
    scheduler = full_house(64)
    newcomer = of("one", 0, num_output=7, num_prompt=num_prompt)
    scheduler.add(newcomer)
    num_running = len(scheduler.running)
    for number in range(7):
        assert run_step(scheduler)["one"] == 1, number
    assert newcomer.finish_reason == "length" and newcomer.num_preemptions == 0
    assert 0 < len(scheduler.running) < num_running


def test_no_more_is_taken_away_than_a_share() -> None:
    """Who wants more than a share waits as everybody does; nobody is preempted for that."""
    scheduler = full_house(64)
    scheduler.add(of("one", 0, num_output=1, num_prompt=32))
    assert run_step(scheduler)["one"] == 0


def test_who_has_one_sequence_keeps_it() -> None:
    scheduler = Scheduler(8, 40, 1, block_manager=BlockManager(1, 40))
    scheduler.add(of("large", 0, num_prompt=38, num_output=1))
    scheduler.add(of("one", 0))
    assert run_step(scheduler) == {"large": 1}
    assert overdrawn_callers([of("large", 0), of("other", 0)], 0, 4) == set()


def test_growing_takes_from_who_has_more_than_a_share() -> None:
    """Also if theirs came first: by arrival alone the last to come would lose its blocks."""
    scheduler = full_house(64)
    late = [of("late", i) for i in range(2)]
    scheduler.add(late[0])
    run_step(scheduler)
    scheduler.add(late[1])
    for _ in range(60):
        run_step(scheduler)
    assert all(one.finish_reason == "length" and one.num_preemptions == 0 for one in late)


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("caller", "alone", "beside"), [("many", 32, 8), (None, 100, 100)])
def test_one_callers_prompts_do_not_make_a_step_long(caller: Hashable, alone: int, beside: int) -> None:
    """A named caller has so many tokens of prompts in a step, alone and beside others; a program of its own has all."""
    scheduler = Scheduler(64, 60, 4, fair_size=2, max_num_batched_tokens=100)
    for i in range(50):
        scheduler.add(of(caller, i, num_prompt=30))
    assert _prompt_tokens(scheduler) == {caller: alone}
    scheduler.add(of("one", 0, num_prompt=30))
    seen: Counter[Hashable] = Counter()
    for _ in range(12):
        tokens = _prompt_tokens(scheduler)
        assert tokens["one"] <= 8 and tokens[caller] <= beside, tokens
        seen += tokens
    assert seen["one"] == 30 and seen[caller] > 8


def _prompt_tokens(scheduler: Scheduler) -> Counter[Hashable]:
    plan = scheduler.schedule()
    tokens: Counter[Hashable] = Counter()
    for item in plan.scheduled:
        if not item.is_decode:
            tokens[item.sequence.caller] += item.num_tokens
    scheduler.commit([Outcome(item.sequence, (7,), item.end) for item in plan.scheduled if item.num_logits])
    return tokens
