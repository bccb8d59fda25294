"""``benchmarks.neighbours``: a real engine beside real busy processes, for a few tokens."""

from pathlib import Path

import pytest

from benchmarks.neighbours import busy, measure
from mini_infer import LLM
from mini_infer.cli.bench import Workload
from tests.engine.checkpoints import make_engine_checkpoint


def test_neighbours_are_busy_and_then_gone() -> None:
    with pytest.raises(KeyboardInterrupt), busy(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
        raise KeyboardInterrupt
    assert len(processes) == 2 and all(process.returncode is not None for process in processes)


def test_a_round(tmp_path: Path) -> None:
    with LLM(str(make_engine_checkpoint(tmp_path)), device="cpu", max_model_len=64) as llm:
        found = measure(llm, Workload.draw(2, (4, 8), (2, 3)), rounds=2)
    assert list(found) == ["0", "1", "2"] and found["0"]["share_of_idle"] == 1
    for row in found.values():
        assert len(row["tokens_per_second_of_each_round"]) == 2 and min(row["tokens_per_second_of_each_round"]) > 0
        assert row["share_of_idle"] > 0
