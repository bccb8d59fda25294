"""How many threads kernels start beside busy programs: the arithmetic, the counters, and real busy programs."""

import os
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")

from benchmarks.neighbours import busy
from mini_infer.kernels.cpu import cores
from mini_infer.kernels.cpu.cores import Cores, Reading, left, read

MINE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.mark.parametrize("seed", range(20))
def test_what_others_use_is_not_ours(seed: int) -> None:
    draw = random.Random(seed)
    print(f"seed {seed}")
    num_cores, busy_programs = draw.randint(2, 64), draw.randint(0, 70)
    seconds, own = draw.uniform(0.25, 10), draw.uniform(0, 1)
    begin = Reading(draw.uniform(0, 1e6), draw.uniform(0, 1e6), draw.uniform(0, 1e5))
    own_seconds = own * max(0, num_cores - busy_programs) * seconds
    used = begin.used + busy_programs * seconds + own_seconds
    end = Reading(begin.wall + seconds, used, begin.own + own_seconds)
    assert left(begin, end, num_cores) == max(1, num_cores - busy_programs)


def test_one_that_shares_a_core_with_a_thread_of_ours_is_seen() -> None:
    # Two threads and one busy program on two cores: it gets half a core at least, and two thirds at most.
    for its_share in (0.5, 2 / 3):
        assert left(Reading(0, 0, 0), Reading(1, 2, 2 - its_share), 2) == 1
    assert left(Reading(0, 0, 0), Reading(1, 2, 1.75), 2) == 2  # a quarter is no reason
    assert left(Reading(0, 0, 0), Reading(1, 1.9, 2), 2) == 2  # counters err


def test_only_cores_that_this_process_may_use_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stat"
    file.write_text(
        "cpu 1 1 1 1 1 1 1 1 0 0\ncpu0 100 20 30 9999 9999 4 6 77 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\n\nintr 5\n"
    )
    monkeypatch.setattr(cores, "_COUNTERS", file)
    found = read({0, 7})
    assert found is not None and found.used == 160 / os.sysconf("SC_CLK_TCK")


def test_without_counters_all_cores_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_COUNTERS", tmp_path / "none")
    monkeypatch.setattr(cores, "INTERVAL", 0)
    assert read({0}) is None and [Cores().threads(wanted) for wanted in (1, 2, 64)] == [1, 2, 64]


@pytest.mark.skipif(MINE < 2 or not Path("/proc/stat").exists(), reason="needs two cores and their counters")
def test_what_was_long_ago_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Reading(100.0, 50.0, 10.0)
    monkeypatch.setattr(cores, "read", lambda _: now)
    monkeypatch.setattr(time, "monotonic", lambda: now.wall)
    mine = Cores()
    for seconds, threads in ((0.3, 1), (0.1, 1), (5.0, MINE), (0.3, 1)):  # all is others' work
        now = Reading(now.wall + seconds, now.used + seconds * MINE, now.own)
        assert mine.threads(MINE) == threads


@pytest.mark.skipif(MINE < 2 or not Path("/proc/stat").exists(), reason="needs two cores and their counters")
def test_beside_as_many_busy_programs_as_cores_there_is_one_thread() -> None:
    mine = Cores()
    with busy(MINE):
        deadline = time.monotonic() + 30
        while mine.threads(MINE) > 1:
            assert time.monotonic() < deadline, "busy programs were never seen"
    assert mine.threads(1) == 1
    assert mine.threads(MINE + 1) == MINE + 1  # who wants more threads than cores gets them
