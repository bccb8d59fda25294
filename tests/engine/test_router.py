"""The router: integers, without a replica in sight."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.engine.router import IN_FLIGHT_TOKENS, Router


def prompt(stem: int, length: int, tail: int) -> list[int]:
    return [stem * 1000 + i for i in range(length)] + [10**6 + tail]


def test_requests_alike_are_shared_out_evenly_and_in_turn() -> None:
    router = Router(3, 16, 0)
    assert [router.choose(number, prompt(number, 10, 0)) for number in range(9)] == [0, 1, 2] * 3


def test_a_prefix_goes_where_it_was_sent_even_if_it_is_not_computed_yet() -> None:
    router = Router(2, 4, 1000)
    first = router.choose("a", prompt(1, 400, 0))
    assert first == 0
    assert router.choose("b", prompt(2, 300, 0)) == 1
    router.computed("a")
    assert router.choose("c", prompt(1, 400, 1)) == 0
    assert router.choose("d", prompt(1, 400, 2), salt="other") == 0, "there nothing is known anywhere, and 0 has less"


def test_a_popular_prefix_does_not_draw_everything() -> None:
    router = Router(2, 4, 1000)
    places = []
    for number in range(200):
        places.append(router.choose(number, prompt(1, 64, number)))
        router.computed(number)  # and decodes on
    assert places.count(1) > 60


def test_whoever_was_used_longest_ago_takes_what_costs_the_same() -> None:
    router = Router(2, 16, 0)
    for number in range(6):
        assert router.choose(number, [1]) == number % 2
        router.ended(number)


def test_contents_are_forgotten_as_a_cache_would() -> None:
    router = Router(2, 4, 10)
    assert router.choose("a", prompt(1, 40, 0)) == 0
    router.ended("a")
    assert router.choose("b", prompt(2, 40, 0)) == 1
    router.ended("b")
    assert router.choose("c", prompt(3, 40, 0)) == 0, "whose ten blocks are these now"
    router.ended("c")
    assert router.choose("d", prompt(1, 40, 0)) == 1
    router.ended("d")


@given(st.integers(1, 5), st.integers(0, 2**32), st.sampled_from((0, 8, 64)))
def test_accounts_are_settled_whatever_happens(num_replicas: int, seed: int, num_blocks: int) -> None:
    draw = random.Random(seed)
    router = Router(num_replicas, 4, num_blocks)
    alive: list[int] = []
    for number in range(60):
        if alive and draw.random() < 0.4:
            router.ended(alive.pop(draw.randrange(len(alive))))
        elif alive and draw.random() < 0.4:
            router.computed(draw.choice(alive))
        else:
            assert 0 <= router.choose(number, prompt(draw.randrange(4), draw.randrange(40), number)) < num_replicas
            alive.append(number)
        assert sum(load.num_requests for load in router._loads) == len(alive)
        assert all(load.num_waiting_tokens >= 0 and len(load.blocks) <= num_blocks for load in router._loads)
    for number in alive:
        router.ended(number)
        router.ended(number)
    assert all((load.num_waiting_tokens, load.num_requests) == (0, 0) for load in router._loads)


@pytest.mark.parametrize("num_requests", [100])
def test_no_replica_is_more_than_a_request_ahead_of_what_the_price_allows(num_requests: int) -> None:
    """Without prefixes to win, loads differ by one prompt at most."""
    draw = random.Random(0)
    router = Router(4, 4, 0)
    longest = 0
    for number in range(num_requests):
        length = draw.randint(1, 300)
        longest = max(longest, length + IN_FLIGHT_TOKENS)
        router.choose(number, [0] * length)
        work = [load.num_waiting_tokens + IN_FLIGHT_TOKENS * load.num_requests for load in router._loads]
        assert max(work) - min(work) <= longest
