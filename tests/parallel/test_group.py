"""What real ranks say to each other, in processes of their own."""

import subprocess
import sys
import textwrap

from mini_infer.parallel.group import Store

RECORDED = """
import os
import sys
import torch
from mini_infer.kernels.cpu.recording import cpu_capture
from mini_infer.parallel.group import interface_of, join
rank, port = int(sys.argv[1]), int(sys.argv[2])
group, _ = join(("127.0.0.1", port), rank, 1, 2, torch.device("cpu"), interface_of("127.0.0.1"), 60.0)
assert not group.on_device
x = torch.full((2, 3), 1.0 + rank)
with torch.inference_mode():
    replay, result = cpu_capture()(lambda: group.sum(group.sum(x * 2) + x) * 0.5)
    first = result.clone()
    for number in (10.0, 100.0):
        x.fill_(number + rank)
        replay()
        print(result[0, 0].item(), result.unique().numel(), first[0, 0].item())
sys.stdout.flush()
os._exit(0)  # as a rank ends: gloo's threads may still be at work, and would be torn down beneath them
"""


def run_ranks(script: str, size: int = 2) -> list[str]:
    """What each of them prints."""
    store = Store("127.0.0.1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(rank), str(store.port)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    words = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size
    return words


def test_a_recording_sums_anew_each_time_it_is_replayed() -> None:
    """(2 (a + b) + a) + (2 (a + b) + b), halved, is 2.5 (a + b)."""
    expected = "".join(f"{2.5 * (2 * number + 1)} 1 7.5\n" for number in (10, 100))
    assert run_ranks(RECORDED) == [expected] * 2
