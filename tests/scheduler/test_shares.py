"""No caller takes more than a share while others want something, too."""

import random
from collections import Counter
from collections.abc import Hashable

import pytest

from mini_infer.scheduler import Outcome, Scheduler, Sequence, seats_for_one
from mini_infer.scheduler.shares import StepShares, fair_share
from tests.scheduler.test_scheduler import sequence


def of(caller: Hashable, number: int, num_output: int = 30) -> Sequence:
    one = sequence(f"{caller}-{number}", 3, num_output)
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
    ready = [of("a", i) for i in range(100)]
    shares = StepShares(8)
    assert shares.choose(ready, ()) == shares.choose(ready, {"a"}) == ready
    assert len(shares.choose(ready, {"a", "b"})) == 7  # b is about to get its turn
    assert shares.choose([of(None, i) for i in range(100)], {None}) != []


def run_step(scheduler: Scheduler) -> Counter[Hashable]:
    plan = scheduler.schedule()
    scheduler.commit([Outcome(item.sequence, (7,), item.end) for item in plan.scheduled if item.num_logits])
    return Counter(item.sequence.caller for item in plan.scheduled)


def test_seats_are_left_for_who_has_none() -> None:
    scheduler = Scheduler(16, 40, 4, fair_size=4)
    for i in range(50):
        scheduler.add(of("many", i))
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
