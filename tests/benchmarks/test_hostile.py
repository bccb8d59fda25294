"""The attacks of ``benchmarks.hostile``, in short: every one is answered, the victim is served, memory stays bounded.

How fast the victim is served depends on the machine, and is for the benchmark to say.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.hostile import ATTACKS, attackers_process, run_attack
from benchmarks.servers import running_server

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")

SERVED = {"200", "connected"}
REFUSED = {"400", "413", "429", "503", "closed", "unanswered"}


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[ProcessPoolExecutor, int, int]]:
    with (
        running_server("--dtype", "float32", "--num-gpu-blocks", "256", "--max-num-seqs", "64") as (port, pid),
        attackers_process() as attackers,
    ):
        yield attackers, port, pid


@pytest.mark.parametrize("name", ["tokenize", "validation", "bodies", "silence", "queue", "answers"])
def test_the_victim_is_served(place: tuple[ProcessPoolExecutor, int, int], name: str) -> None:
    attackers, port, pid = place
    tally = asyncio.run(run_attack(name, attackers, port, pid, seconds=1.5, period=0.2))
    assert name in ATTACKS and tally.latencies and tally.failures == 0
    assert tally.answers and set(tally.answers) <= SERVED | REFUSED, tally.answers
    assert tally.peak_rss_mib - tally.rss_before_mib < 600, "far more than any of these may hold"
