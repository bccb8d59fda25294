"""Steps that overlap give the tokens of steps one after the other: under pressure, with aborts, stops and failures."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLM, AsyncLLMEngine, SamplingParams
from mini_infer.outputs import GenerateOutput
from tests.engine.checkpoints import EOS, make_engine_checkpoint
from tests.engine.executors import Failing, Late, Logging, Recording, interpose

MAX_LEN = 96
DEPTHS = (2, 3, 4)


@pytest.fixture(scope="module", params=["mistral", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=3, num_hidden_layers=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("small"), "qwen3", seed=5, num_hidden_layers=2)


def draw_request(draw: random.Random, looks_back: bool) -> tuple[list[int], SamplingParams]:
    stem = [7 * i % 256 for i in range(draw.choice([0, 0, 5, 16, 33, 60]))]
    prompt = stem + [draw.randrange(256) for _ in range(draw.randint(1, 20))]
    params = SamplingParams(
        n=draw.choice([1, 1, 1, 2, 3]),
        temperature=draw.choice([0.0, 0.7, 1.5]),
        top_p=draw.choice([1.0, 0.8]),
        top_k=draw.choice([-1, 20]),
        seed=draw.randrange(1000),
        max_tokens=draw.choice([1, 2, *[draw.randint(4, 30)] * 4]),
        min_tokens=draw.choice([0, 0, 1]),
        ignore_eos=draw.random() < 0.5,
        stop_token_ids=draw.choice([None, [EOS, *range(40)]]),
        stop=draw.choice([None, ["a", "zq"], ["\x00"]]),
        logit_bias=draw.choice([None, {97: 4.0}]),
        frequency_penalty=0.5 if looks_back and draw.random() < 0.3 else 0.0,
        logprobs=1 if looks_back and draw.random() < 0.3 else None,
    )
    return prompt, params


def draw_fields(draw: random.Random) -> dict[str, Any]:
    block_size = draw.choice([1, 2, 4, 8, 16])
    return {
        "dtype": "float64",
        "max_model_len": MAX_LEN,
        "block_size": block_size,
        "num_gpu_blocks": -(-MAX_LEN // block_size) + draw.randint(0, 24 // block_size),
        "num_cpu_blocks": draw.choice([0, 3, 100 // block_size + 1]) + 1,
        "max_num_seqs": draw.randint(3, 8),
        "max_num_batched_tokens": draw.randint(1, 64),
        "enable_prefix_caching": draw.random() < 0.7,
        "preemption_mode": draw.choice(["recompute", "swap", "auto"]),
        "watermark": draw.choice([0.0, 0.01, 0.2]),
    }


def results(output: GenerateOutput) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs]


def check_workload(checkpoint: Path, alone: LLM, seed: int) -> LLM:
    """Requests that come and leave between steps; whoever stays has the tokens it would have alone."""
    draw = random.Random(seed)
    looks_back = draw.random() < 0.3
    engine = LLM(checkpoint, overlap=draw.choice(DEPTHS), **draw_fields(draw))
    to_come = [draw_request(draw, looks_back) for _ in range(draw.randint(8, 20))]
    requests: dict[str, tuple[list[int], SamplingParams]] = {}
    aborted: set[str] = set()
    while to_come or not engine.is_finished():
        while to_come and draw.random() < 0.8:
            prompt, params = to_come.pop()
            requests[engine.add_request(prompt, params)] = (prompt, params)
        if requests and draw.random() < 0.05:
            request_id = draw.choice(list(requests))
            engine.abort(request_id)
            aborted.add(request_id)
        engine.step()
        stats = engine.stats()
        assert stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks == stats.num_blocks
    assert (engine.stats().num_used_blocks, engine.stats().num_used_cpu_blocks) == (0, 0)
    for request_id, (prompt, params) in requests.items():
        output = engine.get_output(request_id)
        assert output is not None
        (expected,) = alone.generate([prompt], params)
        for got, whole in zip(results(output), results(expected), strict=True):
            if got[2] == "abort" and request_id in aborted:  # perhaps in the middle of a character
                assert got[0] == whole[0][: len(got[0])] and whole[1].startswith(got[1].rstrip("\ufffd"))
            else:
                assert got == whole, (seed, request_id, prompt, params)
    return engine


def check_workloads(checkpoint: Path, seeds: range) -> None:
    alone = LLM(checkpoint, dtype="float64", max_model_len=MAX_LEN)
    stats = [check_workload(checkpoint, alone, seed).stats() for seed in seeds]
    # The workloads are of no use if they never get into trouble.
    assert sum(s.num_swap_preemptions for s in stats) > 0
    assert sum(s.num_recompute_preemptions for s in stats) > 0
    assert max(s.prefix_hit_rate for s in stats) > 0.2


def test_tokens_are_those_of_steps_one_after_the_other(checkpoint: Path) -> None:
    check_workloads(checkpoint, range(10))


@pytest.mark.slow
def test_tokens_are_those_of_steps_one_after_the_other_in_many_workloads(checkpoint: Path) -> None:
    check_workloads(checkpoint, range(10, 150))


@pytest.mark.parametrize("depth", DEPTHS)
def test_steps_are_under_way_when_one_is_read(small: Path, depth: int) -> None:
    """What overlap is about: the next steps are queued before the first one's tokens are asked for."""
    engine = LLM(small, overlap=depth)
    executor = interpose(engine, Logging)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    # The last token is not followed, so that nothing is queued behind it.
    queued = [f"submit {number}" for number in range(5)]
    read = [f"read {number}" for number in range(5)]
    order = queued[: depth - 1]
    for place in range(5):
        order += [*queued[depth - 1 + place :][:1], read[place]]
    assert executor.log == order


def test_step_and_is_finished_speak_of_what_was_read(small: Path) -> None:
    engine = LLM(small, overlap=True)
    request_id = engine.add_request([1, 2, 3], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    assert engine.step() == ([], 3)
    assert not engine.is_finished()
    finished, num_tokens = engine.step()
    assert num_tokens == -1 and [name for name, _ in finished] == [request_id]
    assert engine.is_finished()
    assert engine.step() == ([], 0)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_stop_token_costs_dropped_tokens_and_leaves_no_trace(small: Path, depth: int) -> None:
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    (free,) = LLM(small, dtype="float64").generate([[5, 6, 7]], greedy)
    token_id = free.token_ids[4]
    stopping = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[token_id])
    sync, overlapped = (LLM(small, overlap=d, dtype="float64") for d in (1, depth))
    outputs = [engine.generate([[5, 6, 7]], stopping)[0] for engine in (sync, overlapped)]
    assert results(outputs[0]) == results(outputs[1])
    assert outputs[0].outputs[0].finish_reason == "stop"
    assert outputs[0].cumulative_logprob == pytest.approx(outputs[1].cumulative_logprob)
    stats = overlapped.stats()
    assert stats.num_generated_tokens == sync.stats().num_generated_tokens
    assert overlapped.is_finished()
    assert overlapped.stats().num_used_blocks == 0


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("failing", [{0}, {1}, {3}, {3, 4}, {2, 5, 9}])
def test_a_failed_step_loses_nothing(small: Path, failing: set[int], depth: int) -> None:
    draw = random.Random(1)
    requests = [draw_request(draw, looks_back=False) for _ in range(12)]
    prompts, params = [prompt for prompt, _ in requests], [own for _, own in requests]
    fields: dict[str, Any] = {
        "dtype": "float64",
        "max_model_len": MAX_LEN,
        "block_size": 4,
        "num_gpu_blocks": 30,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "enable_prefix_caching": True,
    }
    expected = [results(output) for output in LLM(small, **fields).generate(prompts, params)]
    engine = LLM(small, overlap=depth, **fields)
    interpose(
        engine,
        lambda executor: Failing(executor, lambda n, _: RuntimeError(f"step {n} fails") if n in failing else None),
    )
    ids = [engine.add_request(prompt, own) for prompt, own in requests]
    num_failed = 0
    while not engine.is_finished():
        try:
            engine.step()
        except RuntimeError as error:
            assert "fails" in str(error)
            num_failed += 1
    assert num_failed >= 1
    got = [engine.get_output(request_id) for request_id in ids]
    assert [results(output) for output in got if output is not None] == expected
    assert engine.stats().num_used_blocks == 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_penalties_and_logprobs_are_those_of_the_plain_loop(small: Path, depth: int) -> None:
    penalised = SamplingParams(max_tokens=20, temperature=0, frequency_penalty=1.5, logprobs=2, prompt_logprobs=1)
    logged = SamplingParams(max_tokens=20, temperature=0, logprobs=2)
    plain = SamplingParams(max_tokens=30, temperature=0)
    engines = [LLM(small, overlap=d, dtype="float64") for d in (1, depth)]
    prompts, params = [[1, 2, 3], [4, 5], [6]], [penalised, plain, logged]
    for ours, theirs in zip(*(engine.generate(prompts, params) for engine in engines), strict=True):
        assert results(ours) == results(theirs)
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-10)
        for our_place, their_place in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert list(our_place) == list(their_place)
    beams = [engine.beam_search([[1, 2]], 3, 6)[0] for engine in engines]
    assert results(beams[0]) == results(beams[1])


def test_penalties_wait_for_the_last_token_and_log_probabilities_do_not(small: Path) -> None:
    """Only a rule that looks back keeps the next step waiting, and only as long as its request lasts."""

    def order(params: SamplingParams) -> list[str]:
        engine = LLM(small, overlap=3)
        executor = interpose(engine, Logging)
        engine.generate([[1, 2, 3]], params)
        return executor.log[:4]

    greedy: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
    assert order(SamplingParams(**greedy, presence_penalty=0.1)) == ["submit 0", "read 0", "submit 1", "read 1"]
    eager = ["submit 0", "submit 1", "submit 2", "read 0"]
    assert order(SamplingParams(**greedy, logprobs=2, logit_bias={3: 1.0}, min_tokens=2)) == eager


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_is_computed_late_is_computed_in_order(small: Path, depth: int) -> None:
    """Steps that nobody waits for any more are still computed, and a request that takes turns does not start beside
    them."""
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    plain, engine = LLM(small, dtype="float64"), LLM(small, overlap=depth, dtype="float64")
    executor = interpose(engine, Late)
    recorded = interpose(engine, Recording)
    (free,) = plain.generate([[5, 6, 7]], greedy)
    stopping = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[free.token_ids[4]])
    looking = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=1, presence_penalty=0.3)
    assert results(engine.generate([[5, 6, 7]], stopping)[0]) == results(plain.generate([[5, 6, 7]], stopping)[0])
    assert len(executor.left) == depth - 1  # those that were dropped
    assert results(engine.generate([[8] * 30], looking)[0]) == results(plain.generate([[8] * 30], looking)[0])
    assert not executor.left
    assert len(recorded.outputs) == len(recorded.steps)


def test_streams_of_the_async_engine(small: Path) -> None:
    async def collect(engine: AsyncLLMEngine, prompt: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        return [token async for part in engine.generate(prompt, params) for token in part.token_ids]

    async def run(overlap: bool) -> list[list[int]]:
        async with AsyncLLMEngine(model=small, dtype="float64", overlap=overlap) as engine:
            return list(await asyncio.gather(*(collect(engine, [i, i + 1]) for i in range(6))))

    assert asyncio.run(run(True)) == asyncio.run(run(False))
