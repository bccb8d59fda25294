"""What single tricks of the CPU backend bring, each switched off and on in turns: ``python -m benchmarks.tricks``.

Tricks that make a kernel as a whole are in the kernels' own report, beside the reference (``pytest --benchmark``). Here
are those that can be taken out of it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.compare import random_checkpoint
from benchmarks.report import save
from benchmarks.shapes import SHAPES
from mini_infer import LLM, SamplingParams, kernels
from mini_infer.kernels.cpu import jit, linear

PROMPT_TOKENS, OUTPUT_TOKENS = 16, 32

console = Console()


def in_turns(rounds: int, before: Callable[[], float], after: Callable[[], float]) -> dict[str, float]:
    """Medians of the seconds that both report, alternating, and the median of the rounds' ratios."""
    before(), after()  # compile, and touch the memory
    seconds = [(before(), after()) for _ in range(rounds)]
    return {
        "before_ms": round(1e3 * statistics.median(first for first, _ in seconds), 3),
        "after_ms": round(1e3 * statistics.median(second for _, second in seconds), 3),
        "speedup": round(statistics.median(first / second for first, second in seconds), 3),
    }


def long_runs(shape: str, num_tokens: int, rounds: int) -> dict[str, float]:
    """The output layer's product, whose tasks are one panel of weights, and 2 MiB of them."""
    vocab_size, hidden_size = SHAPES[shape]["vocab_size"], SHAPES[shape]["hidden_size"]
    multiply, _ = linear.pack_linear(torch.randn(vocab_size, hidden_size).bfloat16(), None)
    x = torch.randn(num_tokens, hidden_size).bfloat16()

    def seconds(run: int) -> float:
        with patch.object(linear, "RUN", run):
            start = time.perf_counter()
            multiply(x)
            return time.perf_counter() - start

    return in_turns(rounds, lambda: seconds(1), lambda: seconds(linear.RUN))


def several_tasks(shape: str, num_tokens: int, rounds: int) -> dict[str, float]:
    """A norm, whose tasks are tokens: one at a time, and as many as make some dozen turns for each thread."""
    width = SHAPES[shape]["hidden_size"]
    x, residual, weight = (torch.randn(*size, width).bfloat16() for size in ((num_tokens,), (num_tokens,), ()))
    cpu = kernels.resolve("cpu", "cpu")

    def seconds(turns: int) -> float:
        with patch.object(jit, "TURNS", turns):
            start = time.perf_counter()
            cpu.add_rmsnorm(x, residual, weight, 1e-6)
            return time.perf_counter() - start

    return in_turns(rounds, lambda: seconds(num_tokens), lambda: seconds(jit.TURNS))


def drawing(shape: str, batch: int, rounds: int) -> dict[str, float]:
    """A token of the vocabulary at random, from the 50 likeliest: PyTorch's operations, and one kernel."""
    logits = torch.randn(batch, SHAPES[shape]["vocab_size"]).bfloat16()
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

    return in_turns(rounds, lambda: seconds(composed), lambda: seconds(fused))


def recording(shape: str, batch: int, rounds: int) -> dict[str, float]:
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
    with called, replayed:
        return in_turns(rounds, lambda: step_seconds(called), lambda: step_seconds(replayed))


def measure(shape: str, rounds: int) -> Iterator[dict[str, Any]]:
    for num_tokens in (1, 16):
        yield {"trick": "runs", "shape": shape, "tokens": num_tokens, **long_runs(shape, num_tokens, rounds)}
    yield {"trick": "turns", "shape": shape, "tokens": 1024, **several_tasks(shape, 1024, rounds)}
    yield {"trick": "drawing", "shape": shape, "tokens": 16, **drawing(shape, 16, rounds)}
    for decoded, batch in (("tiny", 1), ("tiny", 64), (shape, 1)):
        yield {"trick": "recording", "shape": decoded, "tokens": batch, **recording(decoded, batch, rounds)}


def main(
    shape: Annotated[str, typer.Option(help=f"The larger of both models: {', '.join(SHAPES)}.")] = "qwen3-0.6b",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 15,
    keep: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/tricks-cpu.json.")] = False,
) -> None:
    """Measure on this machine."""
    rows = []
    for row in measure(shape, rounds):
        rows.append(row)
        console.print(row)
    if keep:
        command = f"python -m benchmarks.tricks --shape {shape} --rounds {rounds} --save"
        figures = {"dtype": "bfloat16", "rounds": rounds, "threads": torch.get_num_threads(), "tricks": rows}
        console.print(f"written to {save('tricks-cpu', command, figures)}")


if __name__ == "__main__":
    typer.run(main)
