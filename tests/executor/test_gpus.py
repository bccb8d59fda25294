"""Ranks on GPUs: two on one card, over gloo, which is all that one card allows; and over NCCL, with a card for each.

NCCL across cards has not been run by whoever wrote this: no machine with two GPUs has been at hand.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import LLM

from .layouts import PRESSURE, assert_same, draw_requests, make_model, ranks_of
from .test_ranks import steps_and_outputs

NUM_GPUS = torch.cuda.device_count()

one_card = pytest.mark.skipif(NUM_GPUS < 1, reason="there is no GPU: two ranks on one have not been run")
two_cards = pytest.mark.skipif(NUM_GPUS < 2, reason="there are no two GPUs: NCCL across cards has not been run")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), head_dim=64)


def assert_tokens_of_one_card(model: Path, devices: str, sizes: dict[str, int]) -> None:
    fields: dict[str, Any] = {**PRESSURE, "device": devices}
    prompts, params = draw_requests(31, 8)
    with LLM(model, **fields, **sizes) as engine:
        outputs = engine.generate(prompts, params, False)
    with LLM(model, **{**fields, "device": "cuda:0"}) as alone:
        assert_same(outputs, alone.generate(prompts, params, False))


def assert_graphs_change_no_bit(model: Path, devices: str, sizes: dict[str, int]) -> None:
    fields: dict[str, Any] = {**PRESSURE, "device": devices, "dtype": "bfloat16", "kernel_backend": None, **sizes}
    with LLM(model, **fields) as engine:
        steps, outputs = steps_and_outputs(engine, 32)
    with LLM(model, enforce_eager=True, **fields) as engine:
        executor = ranks_of(engine)
        assert [executor.submit(step).result() for step in steps] == outputs


SIZES = pytest.mark.parametrize(
    "sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp2", "pp2"]
)


@one_card
@SIZES
def test_tokens_of_two_ranks_on_one_card(model: Path, sizes: dict[str, int]) -> None:
    assert_tokens_of_one_card(model, "cuda:0,cuda:0", sizes)


@one_card
def test_graphs_of_two_stages_on_one_card(model: Path) -> None:
    assert_graphs_change_no_bit(model, "cuda:0,cuda:0", {"pipeline_parallel_size": 2})


@two_cards
@SIZES
def test_tokens_of_two_cards(model: Path, sizes: dict[str, int]) -> None:
    assert_tokens_of_one_card(model, "cuda:0,cuda:1", sizes)


@two_cards
@SIZES
def test_graphs_with_sums_over_nccl(model: Path, sizes: dict[str, int]) -> None:
    assert_graphs_change_no_bit(model, "cuda:0,cuda:1", sizes)
