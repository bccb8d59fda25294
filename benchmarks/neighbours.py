"""How much of its speed an engine keeps beside busy programs: ``python -m benchmarks.neighbours``.

The same batch decodes with no, one and two other processes that only count, in turns; the share is the median of the
rounds' own ratios. Run it on a machine that does nothing else.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.compare import random_checkpoint
from benchmarks.report import processor, save
from mini_infer import LLM, SamplingParams
from mini_infer.cli.bench import Workload

console = Console()

NEIGHBOURS = (0, 1, 2)


@contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that want a core each, at this process's own priority, and count already."""
    program = "import os\nos.write(1, b'.')\nwhile True: pass"
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout is not None
            process.stdout.read(1)
        yield processes


def measure(llm: LLM, workload: Workload, rounds: int) -> dict[str, Any]:
    """Output tokens per second with each number of neighbours, of each round, and the share of the speed alone."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in workload.num_outputs]
    rates: dict[int, list[float]] = {count: [] for count in NEIGHBOURS}
    llm.generate(workload.prompts, params, use_tqdm=False)  # does not count
    for _ in range(rounds):
        for count in NEIGHBOURS:
            with busy(count):
                begin = time.perf_counter()
                llm.generate(workload.prompts, params, use_tqdm=False)
                rates[count].append(workload.num_output_tokens / (time.perf_counter() - begin))
    return {
        str(count): {
            "tokens_per_second_of_each_round": [round(rate, 2) for rate in some],
            "share_of_idle": round(statistics.median(a / b for a, b in zip(some, rates[0], strict=True)), 3),
        }
        for count, some in rates.items()
    }


def main(
    shape: Annotated[str, typer.Option(help="Checkpoint, as benchmarks.compare has it.")] = "qwen3-0.6b",
    requests: Annotated[int, typer.Option(min=1, help="Sequences that decode at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 3,
    keep: Annotated[
        bool, typer.Option("--save", help="Write benchmarks/results/neighbours-cpu-PROCESSOR.json.")
    ] = False,
) -> None:
    with LLM(str(random_checkpoint(shape)), dtype="bfloat16", device="cpu", max_model_len=4096) as llm:
        found = measure(llm, Workload.draw(requests, (32, 64), (32, 64)), rounds)
    for count, row in found.items():
        console.print(f"{count} busy neighbours: {row['share_of_idle']:.2f} of the speed without")
    if keep:
        command = f"python -m benchmarks.neighbours --shape {shape} --requests {requests} --rounds {rounds} --save"
        save(f"neighbours-cpu-{processor()}", command, {"shape": shape, "requests": requests, "neighbours": found})


if __name__ == "__main__":
    typer.run(main)
