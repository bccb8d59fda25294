"""Replicas give each request what one of them would give alone, offline and to many at once."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mini_infer import LLM, AsyncLLMEngine, EngineConfig, SamplingParams
from mini_infer.engine.replicas import Replicas
from mini_infer.exceptions import InvalidConfigError
from mini_infer.executor.ranks import RankExecutor, lay_out

from .layouts import PRESSURE, assert_same, draw_requests, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: Path) -> LLM:
    return LLM(model, **PRESSURE)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["dp2", "dp2-tp2"])
def replicas(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with LLM(model, data_parallel_size=2, tensor_parallel_size=request.param, **PRESSURE) as engine:
        yield engine


def executor_of(engine: LLM, replica: int) -> RankExecutor:
    assert isinstance(engine._loop, Replicas)
    executor = engine._loop.loops[replica]._executor
    assert isinstance(executor, RankExecutor)
    return executor


@pytest.mark.parametrize("seed", range(2))
def test_answers_of_one_replica(replicas: LLM, alone: LLM, seed: int) -> None:
    prompts, params = draw_requests(seed, 16)
    assert_same(replicas.generate(prompts, params, False), alone.generate(prompts, params, False))
    each, stats = replicas.stats_per_replica(), replicas.stats()
    assert len(each) == 2 and all(one.num_steps > 0 for one in each), "both had something to do"
    assert stats.num_generated_tokens == sum(one.num_generated_tokens for one in each)
    assert stats.num_used_blocks == 0 and stats.num_blocks == 2 * alone.stats().num_blocks


def test_requests_one_by_one(replicas: LLM, alone: LLM) -> None:
    prompts, params = draw_requests(31, 8)
    ids = [replicas.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    gone = replicas.add_request([1, 2, 3], SamplingParams(max_tokens=80, ignore_eos=True))
    snapshot = replicas.snapshot()
    assert len(snapshot.waiting) == len(ids) + 1
    outputs = {}
    replicas.step()
    replicas.abort(gone)
    while len(outputs) < len(ids):
        for request_id in ids:
            if request_id not in outputs and (output := replicas.get_output(request_id)) is not None:
                outputs[request_id] = output
    assert_same([outputs[request_id] for request_id in ids], alone.generate(prompts, params, False))
    aborted = replicas.get_output(gone)
    assert aborted is not None and aborted.finish_reason == "abort"
    assert replicas.is_finished()


def test_the_page_sees_the_blocks_of_both(replicas: LLM) -> None:
    for number in range(4):
        replicas.add_request([number] * 9, SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(6):
        replicas.step()
    snapshot = replicas.snapshot()
    blocks = [block for sequence in snapshot.running for block in sequence.blocks]
    assert len(set(blocks)) == len(blocks) and max(blocks) >= replicas.stats_per_replica()[0].num_blocks
    for sequence in [*snapshot.running, *snapshot.waiting]:
        replicas.abort(sequence.request_id)


@pytest.mark.slow
def test_one_that_is_killed_is_started_again_and_the_other_goes_on(replicas: LLM, alone: LLM) -> None:
    prompts, params = draw_requests(33, 12)
    process = executor_of(replicas, 1)._ranks[0].process
    assert process is not None
    process.kill()
    assert_same(replicas.generate(prompts, params, False), alone.generate(prompts, params, False))
    assert executor_of(replicas, 0)._last_restart is None and executor_of(replicas, 1)._last_restart is not None


@pytest.mark.slow
def test_many_tasks(model: Path, alone: LLM) -> None:
    prompts, params = draw_requests(34, 24)

    async def main() -> None:
        async with AsyncLLMEngine(
            model=model, device=["cpu", "cpu"], **{k: v for k, v in PRESSURE.items() if k != "device"}
        ) as engine:

            async def one(place: int) -> None:
                output = None
                async for increment in engine.generate(prompts[place], params[place]):
                    output = increment.output or output
                assert output is not None
                assert_same([output], [expected[place]])

            await asyncio.gather(*map(one, range(len(prompts))))
            assert len(await engine.stats_per_replica()) == 2, "as many as there are devices"

    expected = alone.generate(prompts, params, False)
    asyncio.run(main())


def test_each_writes_a_trace_of_its_own(model: Path, tmp_path: Path) -> None:
    fields = {**PRESSURE, "trace": tmp_path / "run.json", "data_parallel_size": 2}
    prompts, params = draw_requests(35, 8)
    with LLM(model, **fields) as engine:
        engine.generate(prompts, params, False)
        num_steps = [each.num_steps for each in engine.stats_per_replica()]
    traces = [json.loads((tmp_path / f"run.{replica}.json").read_text()) for replica in range(2)]
    assert [sum(event["name"] == "step" for event in trace) for trace in traces] == num_steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.0.json", "run.1.json"]


def test_lists_and_ranges_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are eight GPUs; and replicas are as many as they are enough for."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cards = [f"cuda:{number}" for number in range(8)]
    for device, sizes, named, replicas in (
        ("cuda:*", {}, cards, 8),
        ("cuda:*", {"tensor_parallel_size": 4}, cards, 2),
        ("cuda:2-5", {"pipeline_parallel_size": 2}, cards[2:6], 2),
        (["cuda:7", "cuda:0"], {"tensor_parallel_size": 2}, ["cuda:7", "cuda:0"], 1),
        ("cuda:1,cpu", {}, ["cuda:1", "cpu"], 2),
        ("cuda", {"tensor_parallel_size": 2, "data_parallel_size": 2}, cards[:4], 2),
        ("auto", {"tensor_parallel_size": 2}, cards[:2], 1),
        ("auto", {}, ["auto"], 1),
        ("cpu:3", {}, ["cpu"] * 3, 3),
        ("cpu", {"tensor_parallel_size": 2}, ["cpu"] * 2, 1),
    ):
        config, devices = lay_out(EngineConfig(device=device, **sizes))
        assert (devices, config.data_parallel_size) == (named, replicas), (device, sizes)
    with pytest.raises(InvalidConfigError, match="16 ranks were asked for and torch sees 8 GPUs"):
        lay_out(EngineConfig(tensor_parallel_size=16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "cpu,cpu,cpu", "tensor_parallel_size": 2}, "names 3 devices, and 1 replicas of 2 ranks need 2"),
        ({"device": "cpu:4", "data_parallel_size": 3}, "names 4 devices, and 3 replicas of 1 ranks need 3"),
        ({"device": "cuda:0,cuda:1"}, "device='cuda:0'"),
        ({"device": ["cpu", "npu:0"]}, "device='npu:0'"),
        ({"device": "cuda:*"}, "names 0 devices"),
    ],
)
def test_devices_that_do_not_go_with_the_sizes(model: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        LLM(model, **fields)
