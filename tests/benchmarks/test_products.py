"""``benchmarks.products``: real products of a small weight, and who is timed in turns."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from benchmarks import products
from benchmarks.products import measure, seconds_in_turns


def test_ways_and_their_weights_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SECONDS", 0)
    calls: list[str] = []

    def way(name: str) -> products.Product:
        def run(x: Tensor) -> Tensor:
            calls.append(name)
            return x

        return run

    found = seconds_in_turns({"a": [way("a0"), way("a1")], "b": [way("b0")]}, torch.ones(1))
    assert calls[:2] == ["a0", "b0"]  # which are not timed
    assert calls[2:] == ["a1", "b0", "a0", "b0"] * 2 + ["a1", "b0"]
    assert all(len(times) == 5 and min(times) >= 0 for times in found.values())


def test_a_row_for_each_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "AT_ONCE", 1 << 20)
    monkeypatch.setattr(products, "SECONDS", 0)
    rows = list(measure(128, 192, [1, 7]))
    assert [(row["inputs"], row["outputs"], row["tokens"]) for row in rows] == [(128, 192, 1), (128, 192, 7)]
    for row in rows:
        assert row["floor_microseconds"] > 0 and row["of_the_machine"] > 0
        assert set(row["microseconds"]) == {"mini-infer"} | ({"onednn"} if "of_onednn" in row else set())
