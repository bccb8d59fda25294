"""Many clients at once, three in ten of whom leave: the others' answers are right, and nothing is left behind."""

from typing import Any

import pytest

from benchmarks.serving import measure

MAX_GROWTH_MIB = 64
"""Of the server's memory; a leak of a request's tokens and text alone would be more."""


def check(figures: dict[str, Any]) -> None:
    print({name: figures[name] for name in ("equal_to_offline", "near_ties", "disconnects", "event_loop_lag_p99")})
    assert figures["wrong"] == 0, figures["examples_of_wrong"]
    assert figures["disconnects"] > 0
    assert figures["equal_to_offline"] + figures["near_ties"] + figures["disconnects"] == figures["requests"]
    assert figures["near_ties"] <= figures["requests"] // 20
    assert figures["kv_blocks_in_use_afterwards"] == 0 == figures["sequences_afterwards"]


def test_a_few() -> None:
    check(measure(num_requests=48, num_clients=16))


@pytest.mark.slow
def test_many() -> None:
    figures = measure(num_requests=5000, num_clients=200)
    check(figures)
    if figures["server_rss_mib_before"] is not None:
        assert figures["server_rss_mib_after"] - figures["server_rss_mib_before"] < MAX_GROWTH_MIB
