"""Ranks give the tokens of one device: shards in float64, stages to the bit; and shards what a sum in order gives."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import LLM, EngineConfig, SamplingParams
from mini_infer.exceptions import InvalidCheckpointError, InvalidConfigError, OutOfMemoryError
from mini_infer.executor.build import load, make_runner
from mini_infer.executor.device import resolve_device
from mini_infer.models import read_config
from mini_infer.parallel.group import Link
from mini_infer.parallel.share import Peers, Share
from mini_infer.step import StepInput, StepOutput
from tests.engine.executors import Recording, interpose
from tests.models.checkpoints import FAMILIES
from tests.models.quantization.test_formats import quantize_in_place
from tests.models.quantization.writers import FORMATS
from tests.parallel.together import ThreadGroup, together

from .layouts import PRESSURE, assert_same, draw_requests, is_running, make_model, pids_of, ranks_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: Path) -> LLM:
    return LLM(model, **PRESSURE)


@pytest.fixture(scope="module", params=[(2, 1), pytest.param((2, 2), marks=pytest.mark.slow)], ids=["tp2", "tp2-pp2"])
def shared(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    shards, stages = request.param
    with LLM(model, tensor_parallel_size=shards, pipeline_parallel_size=stages, overlap=2, **PRESSURE) as engine:
        yield engine
        pids = pids_of(engine)
        assert len(pids) == shards * stages
    assert not any(map(is_running, pids)), "nothing is left behind"


@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_log_probabilities_of_one_device(shared: LLM, alone: LLM, seed: int) -> None:
    prompts, params = draw_requests(seed, 16)
    assert_same(shared.generate(prompts, params, False), alone.generate(prompts, params, False))
    assert shared.stats().num_used_blocks == 0


def test_a_workload_is_what_it_should_be(shared: LLM) -> None:
    stats = shared.stats()
    assert stats.num_preemptions > 0 and stats.num_prefix_hits > 0


def test_beams(shared: LLM, alone: LLM) -> None:
    prompts, _ = draw_requests(9, 4)
    assert_same(shared.beam_search(prompts, 3, 12, False), alone.beam_search(prompts, 3, 12, False))


def test_an_abort_disturbs_nobody(shared: LLM, alone: LLM) -> None:
    prompts, params = draw_requests(17, 8)
    ids = [shared.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    while not shared.is_finished():
        shared.step()
        for gone in ids[::3]:
            if gone in shared._loop.requests:
                shared.abort(gone)
    outputs = [shared.get_output(each) for each in ids]
    kept = [place for place in range(len(ids)) if place % 3]
    expected = alone.generate([prompts[i] for i in kept], [params[i] for i in kept], False)
    assert_same([output for i in kept if (output := outputs[i]) is not None], expected)


def layout(shards: int, stages: int, slow: bool = True) -> Any:
    return pytest.param(shards, stages, marks=pytest.mark.slow if slow else (), id=f"tp{shards}-pp{stages}")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("shards", "stages"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_every_family(tmp_path: Path, family: str, shards: int, stages: int) -> None:
    make_model(tmp_path, family, seed=shards + stages)
    alone = LLM(tmp_path, **PRESSURE)
    with LLM(tmp_path, tensor_parallel_size=shards, pipeline_parallel_size=stages, **PRESSURE) as engine:
        for seed in range(3):
            prompts, params = draw_requests(seed, 12)
            assert_same(engine.generate(prompts, params, False), alone.generate(prompts, params, False))


def steps_and_outputs(engine: LLM, seed: int) -> tuple[list[StepInput], list[StepOutput]]:
    recording = interpose(engine, Recording)
    prompts, params = draw_requests(seed, 12)
    engine.generate(prompts, params, False)
    return recording.steps, [recording.outputs[number] for number in range(len(recording.steps))]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stages_change_no_bit(model: Path, dtype: str, stages: int) -> None:
    fields = {**PRESSURE, "dtype": dtype}
    with LLM(model, pipeline_parallel_size=stages, **fields) as engine:
        steps, outputs = steps_and_outputs(engine, 4)
    executor = LLM(model, **fields)._loop._executor
    assert [executor.submit(step).result() for step in steps] == outputs


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_shards_are_a_sum_in_order(model: Path, dtype: str, stages: int) -> None:
    """And stages of them change no bit of that."""
    assert_two_shards_are_a_sum_in_order(model, dtype, stages)


@pytest.mark.slow
def test_two_shards_are_a_sum_in_order_in_float64(model: Path) -> None:
    """MKL adds up in an order that depends on where in memory a matrix begins, which no two processes agree on; its
    products are the same everywhere if it is told so before it is loaded."""
    call = f"assert_two_shards_are_a_sum_in_order(Path({str(model)!r}), 'float64')"
    subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; from {__name__} import *; {call}"],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"},
        cwd=Path(__file__).parents[2],
        check=True,
    )


def assert_two_shards_are_a_sum_in_order(model: Path, dtype: str, stages: int = 1) -> None:
    fields = {**PRESSURE, "dtype": dtype}
    with LLM(model, tensor_parallel_size=2, pipeline_parallel_size=stages, **fields) as engine:
        steps, outputs = steps_and_outputs(engine, 5)
    assert computed_in_threads(EngineConfig(model=model, **fields), steps) == outputs


def computed_in_threads(config: EngineConfig, steps: list[StepInput]) -> list[StepOutput]:
    """What two ranks in one process give, which add in their order."""
    directory = Path(str(config.model))

    def work(group: ThreadGroup) -> list[StepOutput]:
        loaded = load(config, directory, read_config(directory), resolve_device("cpu"), Peers(Share(group)))
        runner = make_runner(config, loaded, loaded.memory.num_blocks, loaded.memory.max_model_len, Link())
        return [runner.run(step).to_output(step) for step in steps]

    return together(2, work)[0]


RECORDABLE = {**PRESSURE, "dtype": "bfloat16", "kernel_backend": None}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["tensor", "pipeline"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_recorded_decodes_change_no_bit(model: Path, sizes: str, quantization: str | None) -> None:
    """With the kernels for CPUs, which can be recorded: what ranks replay is what they compute step by step."""
    fields = {**RECORDABLE, "quantization": quantization, f"{sizes}_parallel_size": 2}
    with LLM(model, **fields) as engine:
        steps, outputs = steps_and_outputs(engine, 6)
    assert sum(step.num_decodes == len(step.context_lens) for step in steps) > 20
    with LLM(model, enforce_eager=True, **fields) as engine:
        executor = ranks_of(engine)
        assert [executor.submit(step).result() for step in steps] == outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["packed-4-asymmetric", "int-channel", "gptq", "gptq-v2-act-order", "awq", "fp8-block"]
)
def test_quantised_files(tmp_path: Path, name: str) -> None:
    make_model(tmp_path, intermediate_size=96, hidden_size=64, head_dim=32)
    quantize_in_place(tmp_path, *FORMATS[name])
    assert_tokens_of_one_device(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_while_they_load(tmp_path: Path, scheme: str) -> None:
    """57 features are odd, and 72 end within a group of 32."""
    make_model(tmp_path, intermediate_size=57 if scheme == "int8" else 72)
    assert_tokens_of_one_device(tmp_path, quantization=scheme)


def assert_tokens_of_one_device(model: Path, **fields: Any) -> None:
    prompts, params = draw_requests(8, 3)
    with LLM(model, tensor_parallel_size=2, **PRESSURE, **fields) as engine:
        outputs = engine.generate(prompts, params, False)
    assert_same(outputs, LLM(model, **PRESSURE, **fields).generate(prompts, params, False))


def test_what_cannot_be_shared_out_is_refused_with_what_can(model: Path) -> None:
    with pytest.raises(InvalidConfigError, match=r"tensor_parallel_size=3.*4 query heads.*1, 2, 4 devices"):
        LLM(model, tensor_parallel_size=3, device="cpu")
    with pytest.raises(InvalidConfigError, match=r"pipeline_parallel_size=5.*4 layers"):
        LLM(model, pipeline_parallel_size=5, device="cpu")


def test_where_ranks_cannot_talk_replicas_are_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(InvalidConfigError, match="data_parallel_size does not"):
        LLM(model, tensor_parallel_size=2, device="cpu")
    with LLM(model, data_parallel_size=2, **PRESSURE) as engine:
        assert engine.generate([[1, 2]], SamplingParams(max_tokens=1), False)[0].token_ids


@pytest.mark.slow
def test_errors_while_loading_keep_their_type_and_leave_nothing(model: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"rank \d: max_model_len=96 does not fit"):
        LLM(model, tensor_parallel_size=2, **{**PRESSURE, "num_gpu_blocks": 2})


@pytest.mark.slow
def test_a_damaged_file(tmp_path: Path) -> None:
    make_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InvalidCheckpointError, match=r"rank \d: .*truncated"):
        LLM(tmp_path, tensor_parallel_size=2, device="cpu")


@pytest.mark.slow
def test_two_engines_at_once(model: Path, alone: LLM) -> None:
    prompts, params = draw_requests(1, 6)
    with (
        LLM(model, tensor_parallel_size=2, **PRESSURE) as one,
        LLM(model, tensor_parallel_size=2, **PRESSURE) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        outputs = list(pool.map(lambda engine: engine.generate(prompts, params, False), (one, two)))
    expected = alone.generate(prompts, params, False)
    for each in outputs:
        assert_same(each, expected)


def test_nothing_is_started_for_one_device(alone: LLM) -> None:
    from mini_infer.executor.queue import InlineExecutor

    assert isinstance(alone._loop._executor, InlineExecutor)
    assert alone.generate([[1, 2]], SamplingParams(max_tokens=1), False)[0].token_ids
