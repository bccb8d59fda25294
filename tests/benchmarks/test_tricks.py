"""``benchmarks.tricks``: each trick off and on, at a toy size."""

import pytest

pytest.importorskip("numba")

from benchmarks import tricks
from benchmarks.shapes import SHAPES
from mini_infer.kernels.cpu import linear

TOY = {**SHAPES["tiny"], "num_hidden_layers": 1}


def test_both_alternate_and_the_first_round_does_not_count() -> None:
    seconds = iter([9.0, 9.0, 0.002, 0.001, 0.003, 0.001, 0.008, 0.002])
    found = tricks.in_turns(3, lambda: next(seconds), lambda: next(seconds))
    assert found == {"before_ms": 3.0, "after_ms": 1.0, "speedup": 3.0}


def test_every_trick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setitem(tricks.SHAPES, "tiny", TOY)  # type: ignore[index]
    monkeypatch.setattr("benchmarks.compare.tempfile.gettempdir", lambda: str(tmp_path_factory.getbasetemp()))
    run = linear.RUN
    found = list(tricks.measure("tiny", rounds=1))
    assert [(row["trick"], row["tokens"]) for row in found] == [
        ("runs", 1), ("runs", 16), ("drawing", 16), ("recording", 1), ("recording", 64), ("recording", 1),
    ]  # fmt: skip
    assert all(min(row["before_ms"], row["after_ms"], row["speedup"]) > 0 for row in found)
    assert run == linear.RUN, "the trick is on again"
