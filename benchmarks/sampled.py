"""How much longer it takes to draw tokens than to take the likeliest ones: ``python -m benchmarks.sampled``.

The workloads of the README, greedily and at random in turns, in one process and so on the same memory; the figure is
the median of the rounds' own ratios. `benchmarks.compare` runs both, too, but has other engines in between, for so long
that the machine may have changed its speed.
"""

import statistics
import time
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.compare import GREEDY, SAMPLED, TABLE, Sampling, random_checkpoint
from benchmarks.report import processor, save
from mini_infer import LLM, SamplingParams
from mini_infer.cli.bench import Workload

console = Console()


def seconds(llm: LLM, workload: Workload, sampling: Sampling) -> float:
    """Of a whole workload."""
    temperature, top_k, top_p = sampling
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=n, ignore_eos=True)
        for n in workload.num_outputs
    ]
    begin = time.perf_counter()
    llm.generate(workload.prompts, params, use_tqdm=False)
    return time.perf_counter() - begin


def in_turns(llm: LLM, workload: Workload, rounds: int, at_least: float) -> dict[str, Any]:
    """Both ways, each first in every other round, for so many rounds and seconds at least."""
    for sampling in (GREEDY, SAMPLED):
        seconds(llm, workload, sampling)  # does not count
    pairs: list[dict[Sampling, float]] = []
    begin = time.perf_counter()
    while len(pairs) < rounds or time.perf_counter() - begin < at_least:
        order = (GREEDY, SAMPLED) if len(pairs) % 2 else (SAMPLED, GREEDY)
        pairs.append({sampling: seconds(llm, workload, sampling) for sampling in order})
    slower = [pair[SAMPLED] / pair[GREEDY] - 1 for pair in pairs]
    return {
        "rounds": len(pairs),
        "greedy_seconds": round(statistics.median(pair[GREEDY] for pair in pairs), 3),
        "sampled_seconds": round(statistics.median(pair[SAMPLED] for pair in pairs), 3),
        "slower": round(statistics.median(slower), 4),
        "quartiles": [round(float(quartile), 4) for quartile in np.quantile(slower, (0.25, 0.75))],
    }


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TABLE)}; all by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at least, after one that does not count.")] = 3,
    at_least: Annotated[float, typer.Option(min=0, help="Seconds of each workload at least.")] = 30.0,
    keep: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/sampled-cpu-PROCESSOR.json.")] = False,
) -> None:
    """Measure on this machine."""
    if unknown := [name for name in model or [] if name not in TABLE]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(TABLE)}")
    models: dict[str, dict[str, Any]] = {}
    for name in model or TABLE:
        with LLM(str(random_checkpoint(name)), dtype="bfloat16", device="cpu", max_model_len=4096) as llm:
            for scenario in TABLE[name]:
                found = in_turns(llm, scenario.workload, rounds, at_least)
                models.setdefault(name, {})[scenario.name] = found
                console.print(f"{name}, {scenario.name}: sampled {found['slower']:+.1%}", found, soft_wrap=True)
    if keep:
        temperature, top_k, top_p = SAMPLED
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        some = "".join(f"--model {name} " for name in model or ())
        command = f"python -m benchmarks.sampled {some}--rounds {rounds} --at-least {at_least:g} --save"
        figures = {"dtype": "bfloat16", "sampling": sampling, "models": models}
        console.print(f"written to {save(f'sampled-cpu-{processor()}', command, figures)}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
