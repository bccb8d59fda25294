"""Engines of several ranks beside an engine of one, and what is drawn to compare them."""

import random
from pathlib import Path
from typing import Any

from mini_infer import LLM, GenerateOutput, SamplingParams
from mini_infer.executor.ranks import RankExecutor
from tests.engine.checkpoints import make_engine_checkpoint
from tests.engine.executors import Passing

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "intermediate_size": 57}
"""Of a model whose vocabulary (262) and features (57) cannot be shared out evenly."""

PRESSURE: dict[str, Any] = {
    "dtype": "float64",
    "device": "cpu",
    "kernel_backend": "reference",
    "max_model_len": 96,
    "block_size": 4,
    "num_gpu_blocks": 25,
    "num_cpu_blocks": 20,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 40,
    "enable_prefix_caching": True,
    "preemption_mode": "auto",
    "watermark": 0.0,
}
"""Little memory and a small budget: prompts come in chunks, sequences are preempted, blocks are shared."""


def make_model(path: Path, family: str = "qwen3", seed: int = 3, **overrides: Any) -> Path:
    return make_engine_checkpoint(path, family, seed, **{**SHAPE, **overrides})


def ranks_of(engine: LLM) -> RankExecutor:
    executor = engine._loop._executor
    while isinstance(executor, Passing):
        executor = executor.inner
    assert isinstance(executor, RankExecutor)
    return executor


def pids_of(engine: LLM) -> list[int]:
    return [rank.process.pid for rank in ranks_of(engine)._ranks if rank.process is not None]


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def draw_requests(seed: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Of every kind: several completions, seeds, filters, penalties, bans, stops, log probabilities."""
    draw = random.Random(seed)
    prompts, params = [], []
    for _ in range(count):
        stem = [7 * i % 256 for i in range(draw.choice([0, 0, 5, 16, 33]))]
        prompts.append(stem + [draw.randrange(256) for _ in range(draw.randint(1, 20))])
        params.append(
            SamplingParams(
                n=draw.choice([1, 1, 1, 2, 3]),
                temperature=draw.choice([0.0, 0.7, 1.5]),
                top_p=draw.choice([1.0, 0.8]),
                top_k=draw.choice([-1, 20]),
                seed=draw.randrange(1000),
                max_tokens=draw.choice([1, 2, *[draw.randint(4, 30)] * 4]),
                min_tokens=draw.choice([0, 0, 1]),
                ignore_eos=draw.random() < 0.5,
                stop_token_ids=draw.choice([None, [*range(40)]]),
                stop=draw.choice([None, ["a", "zq"]]),
                logit_bias=draw.choice([None, {97: 4.0}]),
                frequency_penalty=draw.choice([0.0, 0.0, 0.5]),
                logprobs=draw.choice([None, 2]),
                prompt_logprobs=draw.choice([None, None, 1]),
            )
        )
    return prompts, params


def assert_same(outputs: list[GenerateOutput], expected: list[GenerateOutput]) -> None:
    """Token for token, and log probabilities as far as the order of sums allows."""
    for place, (one, other) in enumerate(zip(outputs, expected, strict=True)):
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            assert (mine.token_ids, mine.text, mine.finish_reason) == (
                theirs.token_ids,
                theirs.text,
                theirs.finish_reason,
            ), f"request {place}"
            assert abs(mine.cumulative_logprob - theirs.cumulative_logprob) < 1e-8
            for entries, others in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
                assert entries.keys() == others.keys()
                assert all(abs(entries[token].logprob - others[token].logprob) < 1e-8 for token in entries)
