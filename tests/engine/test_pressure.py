"""Whatever the pressure, every request's tokens are what they would be alone (float64)."""

import random
from pathlib import Path

import pytest

from mini_infer import LLM, SamplingParams
from mini_infer.engine import EngineStats
from tests.engine.checkpoints import EOS, make_engine_checkpoint
from tests.models.checkpoints import VARIED_FAMILIES

MAX_LEN = 96


def make_checkpoint(path: Path, family: str) -> Path:
    return make_engine_checkpoint(path / family, family, seed=3, num_hidden_layers=2)


def draw_prompts(draw: random.Random) -> list[list[int]]:
    """Prompts of every length, many of which begin alike."""
    stems = [[draw.randrange(256) for _ in range(60)] for _ in range(3)]
    prompts = []
    for _ in range(draw.randint(3, 14)):
        stem = draw.choice(stems)[: draw.choice([0, 0, 5, 16, 33, 60])]
        prompts.append(stem + [draw.randrange(256) for _ in range(draw.randint(1, 20))])
    return prompts


def draw_params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        n=draw.choice([1, 1, 1, 2, 3]),
        temperature=draw.choice([0.0, 0.7, 1.5]),
        top_p=draw.choice([1.0, 0.8]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
        seed=draw.randrange(1000),
        max_tokens=draw.randint(1, 16),
        ignore_eos=draw.random() < 0.5,
        stop_token_ids=draw.choice([None, [EOS, 17, 80]]),
        prompt_logprobs=draw.choice([None, None, None, 1]),
        cache_salt=draw.choice([None, None, "a"]),
    )


def draw_engine(draw: random.Random, checkpoint: Path, kv_cache_dtype: str) -> LLM:
    block_size = draw.choice([1, 2, 4, 8, 16])
    mode = draw.choice(["recompute", "swap", "auto"])
    return LLM(
        checkpoint,
        dtype="float64",
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=MAX_LEN,
        block_size=block_size,
        num_gpu_blocks=-(-MAX_LEN // block_size) + draw.randint(0, 40 // block_size),
        num_cpu_blocks=draw.choice([3, 100 // block_size + 1]),
        max_num_seqs=draw.randint(3, 8),
        max_num_batched_tokens=draw.randint(1, 64),
        enable_prefix_caching=draw.random() < 0.7,
        preemption_mode=mode,
        scheduling_policy=draw.choice(["fcfs", "priority"]),
        watermark=draw.choice([0.0, 0.01, 0.2]),
    )


def check_workload(checkpoint: Path, alone: LLM, seed: int) -> EngineStats:
    draw = random.Random(seed)
    prompts = draw_prompts(draw)
    params = [draw_params(draw) for _ in prompts]
    engine = draw_engine(draw, checkpoint, alone.config.kv_cache_dtype)
    outputs = []
    for _ in range(2):  # the second time the prefix cache is warm
        ids = [
            engine.add_request(prompt, own, priority=draw.randint(-2, 2))
            for prompt, own in zip(prompts, params, strict=True)
        ]
        while not engine.is_finished():
            engine.step()
            stats = engine.stats()
            assert stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks == stats.num_blocks
        outputs.append([engine.get_output(request_id) for request_id in ids])
    assert (engine.stats().num_used_blocks, engine.stats().num_used_cpu_blocks) == (0, 0)
    for place, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        (expected,) = alone.generate([prompt], own)
        for output in (outputs[0][place], outputs[1][place]):
            assert output is not None
            got = [(completion.token_ids, completion.finish_reason) for completion in output.outputs]
            assert got == [(completion.token_ids, completion.finish_reason) for completion in expected.outputs]
            if own.prompt_logprobs is not None:
                assert output.prompt_logprobs is not None and expected.prompt_logprobs is not None
                for ours, theirs in zip(output.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
                    assert ours is not None and theirs is not None
                    token_id = next(iter(ours))
                    assert ours[token_id].logprob == pytest.approx(theirs[token_id].logprob, abs=1e-8)
    return engine.stats()


def check_workloads(checkpoints: list[Path], seeds: range) -> None:
    """Each seed with the checkpoint whose turn it is."""
    alone = [LLM(checkpoint, dtype="float64", max_model_len=MAX_LEN) for checkpoint in checkpoints]
    stats = [
        check_workload(checkpoints[seed % len(checkpoints)], alone[seed % len(checkpoints)], seed) for seed in seeds
    ]
    # The workloads are of no use if they never get into trouble.
    assert sum(s.num_swap_preemptions for s in stats) > 0
    assert sum(s.num_recompute_preemptions for s in stats) > 0
    assert max(s.prefix_hit_rate for s in stats) > 0.2


def test_tokens_are_what_they_would_be_alone(tmp_path: Path) -> None:
    check_workloads([make_checkpoint(tmp_path, family) for family in VARIED_FAMILIES], range(16))


def test_codes_survive_swaps_copies_and_sharing(tmp_path: Path) -> None:
    checkpoint = make_engine_checkpoint(tmp_path, "qwen3", seed=3, num_hidden_layers=1)
    alone = LLM(checkpoint, dtype="float64", max_model_len=MAX_LEN, kv_cache_dtype="int8")
    stats = [check_workload(checkpoint, alone, seed) for seed in range(2, 5)]
    assert sum(s.num_swap_preemptions for s in stats) > 0
    assert sum(s.num_recompute_preemptions for s in stats) > 0
    assert max(s.prefix_hit_rate for s in stats) > 0.1


def test_auto_weighs_the_whole_model_against_the_copies() -> None:
    """Recomputing a block of the tutor's takes some 6 M multiplications per token; copying it is cheaper."""
    engine = LLM(num_gpu_blocks=12, num_cpu_blocks=32, max_model_len=160, preemption_mode="auto")
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    engine.generate([[5 + i] * 40 for i in range(3)], params)
    stats = engine.stats()
    assert stats.num_swap_preemptions > 0 and stats.num_recompute_preemptions == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIED_FAMILIES)
def test_tokens_are_what_they_would_be_alone_in_many_workloads(tmp_path: Path, family: str) -> None:
    check_workloads([make_checkpoint(tmp_path, family)], range(60))
