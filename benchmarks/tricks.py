"""What single tricks of the CPU backend bring, each switched off and on in turns: ``python -m benchmarks.tricks``.

Tricks that make a kernel as a whole are in the kernels' own report, beside the reference (``pytest --benchmark``). Here
are those that can be taken out of it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.compare import random_checkpoint
from benchmarks.report import save
from mini_infer import LLM, SamplingParams, kernels
from mini_infer.kernels.cpu import linear

ROUNDS = 15
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 32

console = Console()


def in_turns(before: Callable[[], float], after: Callable[[], float]) -> dict[str, float]:
    """Medians of the seconds that both report, alternating, and the median of the rounds' ratios."""
    before(), after()  # compile, and touch the memory
    rounds = [(before(), after()) for _ in range(ROUNDS)]
    return {
        "before_ms": round(1e3 * statistics.median(first for first, _ in rounds), 3),
        "after_ms": round(1e3 * statistics.median(second for _, second in rounds), 3),
        "speedup": round(statistics.median(first / second for first, second in rounds), 3),
    }


def long_runs(num_tokens: int) -> dict[str, float]:
    """A product whose tasks are one panel of weights, and 2 MiB of them."""
    multiply, _ = linear.pack_linear(torch.randn(151936, 1024).bfloat16(), None)
    x = torch.randn(num_tokens, 1024).bfloat16()

    def seconds(run: int) -> float:
        with patch.object(linear, "RUN", run):
            start = time.perf_counter()
            multiply(x)
            return time.perf_counter() - start

    return in_turns(lambda: seconds(1), lambda: seconds(linear.RUN))


def drawing(batch: int) -> dict[str, float]:
    """A token of Qwen3's vocabulary at random, from the 50 likeliest: PyTorch's operations, and one kernel."""
    logits = torch.randn(batch, 151936).bfloat16()
    columns = (
        np.full(batch, 0.8),
        np.full(batch, 50),
        np.full(batch, 0.95),
        np.zeros(batch),
        np.linspace(0, 0.99, batch),
    )
    composed, fused = (kernels.resolve("cpu", backend) for backend in ("reference", "cpu"))

    def seconds(by: kernels.Kernels) -> float:
        start = time.perf_counter()
        by.draw_tokens(logits, *columns)
        return time.perf_counter() - start

    return in_turns(lambda: seconds(composed), lambda: seconds(fused))


def recording(shape: str, batch: int) -> dict[str, float]:
    """A decode step called from Python, and replayed."""
    model = str(random_checkpoint(shape))
    prompts = [[1 + i] * PROMPT_TOKENS for i in range(batch)]

    def step_seconds(llm: LLM) -> float:
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
        metrics = [output.metrics for output in llm.generate(prompts, params, use_tqdm=False)]
        begun = max(metric.first_token_time or metric.finished_time for metric in metrics)
        return (max(metric.finished_time for metric in metrics) - begun) / (OUTPUT_TOKENS - 1)

    called, replayed = (
        LLM(model, enforce_eager=eager, max_model_len=256, num_gpu_blocks=16 * batch) for eager in (True, False)
    )
    return in_turns(lambda: step_seconds(called), lambda: step_seconds(replayed))


def measure() -> Iterator[dict[str, Any]]:
    for num_tokens in (1, 16):
        yield {"trick": "runs", "shape": "qwen3-0.6b", "tokens": num_tokens, **long_runs(num_tokens)}
    yield {"trick": "drawing", "shape": "qwen3-0.6b", "tokens": 16, **drawing(16)}
    for shape, batch in (("tiny", 1), ("tiny", 64), ("qwen3-0.6b", 1)):
        yield {"trick": "recording", "shape": shape, "tokens": batch, **recording(shape, batch)}


def main() -> None:
    """Measure on this machine and write benchmarks/results/tricks-cpu.json."""
    rows = []
    for row in measure():
        rows.append(row)
        console.print(row)
    figures = {"dtype": "bfloat16", "rounds": ROUNDS, "threads": torch.get_num_threads(), "tricks": rows}
    console.print(f"written to {save('tricks-cpu', 'python -m benchmarks.tricks', figures)}")


if __name__ == "__main__":
    typer.run(main)
