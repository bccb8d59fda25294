"""What continuous batching and prefix reuse are worth: ``python -m benchmarks.continuous_batching``.

One seeded, heavy-tailed workload on the bundled model: prompt and output lengths log-normal (medians 160 and 120,
sigma 1), clipped to 4-900. Measured in one run: KV waste, how full the pool is while requests wait, and throughput
beside static batching, which is the same engine given one padded batch at a time and returning it when its slowest
request ends.

With ``--prefix``: mean time to first token of clients that share a long prefix, with and without the prefix cache, on a
random model of a named shape.
"""

import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report import save
from benchmarks.shapes import SHAPES, make_random_checkpoint
from mini_infer import LLM, SamplingParams

Workload = list[tuple[list[int], int]]


def heavy_tailed_workload(num_requests: int, vocab_size: int, seed: int = 0) -> Workload:
    """Prompts and output lengths, ``(token_ids, num_output)``."""
    draw = random.Random(seed)

    def length(median: int) -> int:
        return min(900, max(4, round(draw.lognormvariate(math.log(median), 1))))

    return [([draw.randrange(vocab_size) for _ in range(length(160))], length(120)) for _ in range(num_requests)]


def params(num_output: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)


def run_continuous(llm: LLM, workload: Workload) -> dict[str, float]:
    """Everything queued at once; waste and occupancy are means over the steps in which requests wait."""
    start = time.perf_counter()
    for prompt, num_output in workload:
        llm.add_request(prompt, params(num_output))
    waste, occupancy, tokens = [], [], 0
    while not llm.is_finished():
        finished, _ = llm.step()
        tokens += sum(len(token_ids) for _, token_ids in finished)
        stats = llm.stats()
        if stats.num_waiting:
            waste.append(stats.kv_waste)
            occupancy.append(stats.num_used_blocks / stats.num_blocks)
    return {
        "tokens_per_second": tokens / (time.perf_counter() - start),
        "kv_waste": statistics.mean(waste),
        "pool_occupancy": statistics.mean(occupancy),
    }


def run_static(llm: LLM, workload: Workload, batch_size: int) -> float:
    """Tokens per second when a batch is padded to its longest prompt and output, and returned as a whole."""
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(workload), batch_size):
        batch = workload[first : first + batch_size]
        longest_prompt = max(len(prompt) for prompt, _ in batch)
        longest_output = max(num_output for _, num_output in batch)
        padded = [[0] * (longest_prompt - len(prompt)) + prompt for prompt, _ in batch]
        llm.generate(padded, params(longest_output), use_tqdm=False)
        tokens += sum(num_output for _, num_output in batch)
    return tokens / (time.perf_counter() - start)


def batching(num_requests: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of both; medians."""
    llm = LLM(block_size=16, max_num_seqs=batch_size)
    longest = llm.max_model_len
    workload = [
        (prompt[: longest - 900 - 1] if len(prompt) + num_output > longest else prompt, num_output)
        for prompt, num_output in heavy_tailed_workload(num_requests, 250)
    ]
    workload = [(prompt, min(num_output, longest - len(prompt))) for prompt, num_output in workload]
    # A pool that holds what `batch_size` typical sequences take, so that it is memory that requests wait for.
    tight = LLM(block_size=16, max_num_seqs=4 * batch_size, num_gpu_blocks=batch_size * 24, watermark=0.01)
    pressure, continuous, static = [], [], []
    for _ in range(rounds):
        pressure.append(run_continuous(tight, workload))
        continuous.append(run_continuous(llm, workload)["tokens_per_second"])
        static.append(run_static(llm, workload, batch_size))
    return {
        "requests": num_requests,
        "batch_size": batch_size,
        "rounds": rounds,
        "kv_waste": round(statistics.median(p["kv_waste"] for p in pressure), 4),
        "pool_occupancy_while_requests_wait": round(statistics.median(p["pool_occupancy"] for p in pressure), 4),
        "continuous_tokens_per_second": round(statistics.median(continuous)),
        "static_tokens_per_second": round(statistics.median(static)),
        "continuous_over_static": round(statistics.median(a / b for a, b in zip(continuous, static, strict=True)), 2),
    }


def prefix_reuse(shape: str, num_clients: int, num_prefix: int, num_suffix: int, rounds: int) -> dict[str, Any]:
    """Mean TTFT of clients that ask at once, each with the common prefix and a suffix of its own."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_random_checkpoint(Path(directory), shape)
        engines = {
            caching: LLM(checkpoint, max_model_len=2048, max_num_seqs=num_clients, enable_prefix_caching=caching)
            for caching in (False, True)
        }
        draw = random.Random(0)
        ttft: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            prefix = [draw.randrange(250) for _ in range(num_prefix)]
            prompts = [prefix + [draw.randrange(250) for _ in range(num_suffix)] for _ in range(num_clients)]
            for caching, llm in engines.items():
                llm.generate([[*prefix, 0]], params(1), use_tqdm=False)  # somebody used the prefix before
                outputs = llm.generate(prompts, params(4), use_tqdm=False)
                ttft[caching].append(statistics.mean(output.metrics.time_to_first_token or 0 for output in outputs))
    without, with_ = statistics.median(ttft[False]), statistics.median(ttft[True])
    return {
        "shape": shape,
        "clients": num_clients,
        "prefix_tokens": num_prefix,
        "suffix_tokens": num_suffix,
        "rounds": rounds,
        "mean_ttft_seconds_without": round(without, 3),
        "mean_ttft_seconds_with": round(with_, 3),
        "ratio": round(without / with_, 2),
    }


def main(
    prefix: Annotated[bool, typer.Option(help="Measure prefix reuse instead.")] = False,
    requests: Annotated[int, typer.Option(help="Requests of the workload.")] = 96,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 16,
    shape: Annotated[str, typer.Option(help=f"Random model for --prefix: {', '.join(SHAPES)}.")] = "qwen3-0.6b",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 1,
) -> None:
    name = "prefix_reuse" if prefix else "continuous_batching"
    figures = prefix_reuse(shape, 16, 512, 64, rounds) if prefix else batching(requests, batch_size, rounds)
    table = Table("figure", "value", title=name.replace("_", " "))
    for figure, value in figures.items():
        table.add_row(figure, str(value))
    console = Console()
    console.print(table)
    command = "python -m benchmarks.continuous_batching" + (" --prefix" if prefix else "")
    console.print(f"written to {save(name, command, figures)}")


if __name__ == "__main__":
    typer.run(main)
