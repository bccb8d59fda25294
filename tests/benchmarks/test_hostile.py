"""The attacks of ``benchmarks.hostile``, in short: every one is answered, the victim is served, memory stays bounded.

How fast the victim is served depends on the machine, and is for the benchmark to say.
"""

import asyncio
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from benchmarks.hostile import ATTACKS, run_attack, server_process

pytestmark = pytest.mark.skipif(
    not hasattr(multiprocessing, "get_context") or "fork" not in multiprocessing.get_all_start_methods(),
    reason="needs limits on open files, and /proc",
)

SERVED = {"200", "connected"}
REFUSED = {"400", "413", "429", "503", "closed", "unanswered"}


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[ProcessPoolExecutor, int, int]]:
    with (
        server_process(1, {"dtype": "float32", "num_gpu_blocks": 256, "max_num_seqs": 64}) as (port, pid),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as attackers,
    ):
        yield attackers, port, pid


@pytest.mark.parametrize("name", ["tokenize", "validation", "bodies", "silence", "queue", "answers"])
def test_the_victim_is_served(place: tuple[ProcessPoolExecutor, int, int], name: str) -> None:
    attackers, port, pid = place
    tally = asyncio.run(run_attack(name, attackers, port, pid, seconds=1.5, period=0.2))
    assert name in ATTACKS and tally.latencies and tally.failures == 0
    assert tally.answers and set(tally.answers) <= SERVED | REFUSED, tally.answers
    assert tally.peak_rss_mib - tally.rss_before_mib < 600, "far more than any of these may hold"
