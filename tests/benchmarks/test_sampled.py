"""``benchmarks.sampled``: a real engine, for a few tokens."""

from pathlib import Path

import pytest

from benchmarks import sampled
from benchmarks.compare import GREEDY, SAMPLED, Sampling
from benchmarks.sampled import in_turns
from mini_infer import LLM
from mini_infer.cli.bench import Workload
from tests.engine.checkpoints import make_engine_checkpoint


def test_both_ways_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Sampling] = []
    measured = sampled.seconds

    def noted(llm: LLM, workload: Workload, sampling: Sampling) -> float:
        ran.append(sampling)
        return measured(llm, workload, sampling)

    monkeypatch.setattr(sampled, "seconds", noted)
    with LLM(str(make_engine_checkpoint(tmp_path)), device="cpu", max_model_len=64) as llm:
        found = in_turns(llm, Workload.draw(2, (4, 8), (2, 3)), rounds=3, at_least=0)
    assert ran == [GREEDY, SAMPLED, SAMPLED, GREEDY, GREEDY, SAMPLED, SAMPLED, GREEDY]
    assert found["rounds"] == 3 and found["greedy_seconds"] >= 0 and found["sampled_seconds"] >= 0
    low, high = found["quartiles"]
    assert low <= found["slower"] <= high
