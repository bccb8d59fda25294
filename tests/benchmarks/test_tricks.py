"""``benchmarks.tricks``: how two ways are timed in turns."""

import pytest

pytest.importorskip("numba")

from benchmarks import tricks


def test_both_alternate_and_the_first_round_does_not_count() -> None:
    seconds = iter([9.0, 9.0, 0.002, 0.001, 0.003, 0.001, 0.008, 0.002])
    found = tricks.in_turns(3, lambda: next(seconds), lambda: next(seconds))
    assert found == {"before_ms": 3.0, "after_ms": 1.0, "speedup": 3.0}
