"""What one decode step of the bundled model takes, by batch size: ``make bench``."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mini_infer import LLM, SamplingParams

ROUNDS = 50


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
def test_decode_step(benchmark: BenchmarkFixture, batch_size: int, temperature: float) -> None:
    llm = LLM(max_num_seqs=batch_size)
    params = SamplingParams(temperature=temperature, top_k=50, top_p=0.95, max_tokens=ROUNDS + 10, ignore_eos=True)
    for _ in range(batch_size):
        llm.add_request("What is a KV cache?", params)
    llm.step()  # the prompts; every step from here on decodes
    benchmark.group = f"decode step, batch {batch_size}"
    benchmark.pedantic(llm.step, rounds=ROUNDS, warmup_rounds=5)
    assert llm.stats().num_running == batch_size, "sequences ended while they were timed"
