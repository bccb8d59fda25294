"""The whole host side on token ids, with a stand-in executor, in a process where torch cannot be imported."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_infer import SamplingParams
from mini_infer.outputs import GenerateOutput
from tests.engine.stand_in import EOS, TOY, VOCAB_SIZE, completions_alone, make_stand_in_engine

MAX_LEN = 48


def draw_params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        n=draw.choice([1, 1, 1, 2, 3, 9]),
        temperature=draw.choice([0.0, 0.7, 1.5]),
        seed=draw.randrange(1000),
        max_tokens=draw.choice([1, 2, *[draw.randint(3, 24)] * 4, None]),
        min_tokens=draw.choice([0, 0, 1]),
        ignore_eos=draw.random() < 0.5,
        stop_token_ids=draw.choice([None, [EOS, *range(4)]]),
        logit_bias=draw.choice([None, {7: 4.0, 9: -100}]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.0, 1.3]),
        frequency_penalty=draw.choice([0.0, 0.0, 0.0, 0.5]),
        logprobs=draw.choice([None, None, 2]),
        prompt_logprobs=draw.choice([None, None, None, 1]),
        structured_outputs=draw.choice([None, None, TOY]),
    )


def draw_fields(draw: random.Random) -> dict[str, Any]:
    block_size = draw.choice([1, 2, 4, 8])
    return {
        "max_model_len": MAX_LEN,
        "block_size": block_size,
        "num_blocks": -(-MAX_LEN // block_size) + draw.randint(0, 24 // block_size),
        "num_cpu_blocks": draw.choice([1, 4, 100 // block_size + 1]),
        "max_num_seqs": draw.randint(3, 8),
        "max_num_batched_tokens": draw.choice([1, 2, 5, 16, 64]),
        "enable_prefix_caching": draw.random() < 0.7,
        "preemption_mode": draw.choice(["recompute", "swap", "auto"]),
        "watermark": draw.choice([0.0, 0.01, 0.2]),
        "scheduling_policy": draw.choice(["fcfs", "priority"]),
    }


def check_output(output: GenerateOutput, prompt: list[int], params: SamplingParams, was_aborted: bool) -> None:
    expected = completions_alone(prompt, params, MAX_LEN)
    for got, (token_ids, reason, total) in zip(output.outputs, expected, strict=True):
        if got.finish_reason == "abort" and was_aborted:
            assert got.token_ids == token_ids[: len(got.token_ids)]
            continue
        assert (got.token_ids, got.finish_reason) == (token_ids, reason)
        assert got.cumulative_logprob == pytest.approx(total, abs=1e-9)
        if params.logprobs is not None:
            assert got.logprobs is not None
            each = [place[token].logprob for place, token in zip(got.logprobs, token_ids, strict=True)]
            assert sum(each) == pytest.approx(total, abs=1e-9)
    if params.prompt_logprobs is not None and not was_aborted:
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)


def check_workload(seed: int) -> tuple[int, int]:
    """Requests that come and leave between steps, beside beam searches. Gives how many were swapped and recomputed."""
    draw = random.Random(seed)
    engine = make_stand_in_engine(draw.choice([1, 2, 3, 4]), **draw_fields(draw))
    to_come = []
    for _ in range(draw.randint(6, 16)):
        stem = [3 * i % VOCAB_SIZE for i in range(draw.choice([0, 5, 9, 16]))]
        to_come.append((stem + [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 14))], draw_params(draw)))
    requests: dict[str, tuple[list[int], SamplingParams]] = {}
    aborted: set[str] = set()
    searches = []
    for prompt, width in (([1, 2, 3], 3), ([4] * 9, 2)):
        params = SamplingParams(n=width, max_tokens=8, temperature=0.0)
        searches.append(engine._intake.make_beam_search(prompt, params, 1.0, False))
    for search in searches if draw.random() < 0.5 else []:
        engine.submit(search)
    num_steps = 0
    while to_come or not engine.is_finished():
        while to_come and draw.random() < 0.8:
            prompt, params = to_come.pop()
            requests[engine.add_request(prompt, params, priority=draw.randint(-1, 1))] = (prompt, params)
        if requests and draw.random() < 0.05:
            request_id = draw.choice(list(requests))
            engine.abort(request_id)
            aborted.add(request_id)
        engine.step()
        num_steps += 1
        assert num_steps < 20_000, "it waits for ever"
        stats = engine.stats()
        assert stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks == stats.num_blocks
    stats = engine.stats()
    assert (stats.num_used_blocks, stats.num_used_cpu_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    for request_id, (prompt, params) in requests.items():
        output = engine.get_output(request_id)
        assert output is not None
        check_output(output, prompt, params, request_id in aborted)
    alone = make_stand_in_engine(max_model_len=MAX_LEN)
    for search in searches:
        if search.finished:
            got = search.output()
            (best,) = alone.beam_search([search.prompt_token_ids], search.params.n, 8, use_tqdm=False)
            ours, theirs = ([(c.token_ids, c.finish_reason) for c in o.outputs] for o in (got, best))
            assert ours == theirs
    return stats.num_swap_preemptions, stats.num_recompute_preemptions


def check_workloads(seeds: range) -> None:
    swapped, recomputed = zip(*(check_workload(seed) for seed in seeds), strict=True)
    assert sum(swapped) > 0 and sum(recomputed) > 0  # the workloads are of no use if they never get into trouble


def test_tokens_are_what_they_would_be_alone() -> None:
    check_workloads(range(30))


@pytest.mark.slow
def test_tokens_are_what_they_would_be_alone_in_many_workloads() -> None:
    check_workloads(range(30, 1000))


WITHOUT = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "tokenizers", "safetensors", "numba", "triton"):
            raise ModuleNotFoundError(f"{name} is not to be had here")

sys.meta_path.insert(0, Nowhere())
from tests.engine.test_without_torch import check_workloads
from tests.engine.stand_in import make_stand_in_engine
check_workloads(range(12))
engine = make_stand_in_engine()
print(engine.generate([1, 2], max_tokens=3, use_tqdm=False)[0].token_ids, engine.beam_search([5], 2, 3)[0].token_ids)
try:
    engine.generate("words")
except ValueError as error:
    print(error)
assert not {"torch", "transformers", "numba"} & sys.modules.keys()
"""


def test_in_a_process_where_torch_cannot_be_imported() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "this engine has no tokenizer" in done.stdout
