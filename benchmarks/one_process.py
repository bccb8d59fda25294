"""What an engine of one process pays for there being ranks: ``python -m benchmarks.one_process``.

Three versions in turns, each in a process of its own that is stopped unless it is its turn: the commit before
`mini_infer/parallel` came, the commit that brought it, and this tree. The first two say what ranks cost whoever has
none; the third, what has become of the engine since. A round's ratio is between neighbours in time, and the figure is
the median of the rounds', so that whatever else the machine does hits all of them.
"""

import statistics
import subprocess
from contextlib import ExitStack
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.compare import random_checkpoint
from benchmarks.report import save
from benchmarks.versions import other_tree
from benchmarks.workers.channel import Done
from benchmarks.workers.driver import ROOT, Engine, Worker
from mini_infer.cli.bench import Workload

SHAPE = "tiny"
OPTIONS = {"device": "cpu", "dtype": "float32", "num_gpu_blocks": 2048}


def commit_of_ranks() -> str:
    """The one that brought them."""
    command = ["git", "log", "--diff-filter=A", "--format=%h", "--", "mini_infer/parallel/group.py"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]


def in_turns(workers: dict[str, Worker], requests: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Output tokens per second of each, and the median of its ratios to the first one's, with their spread."""
    workload = Workload.draw(requests, (32, 256), (16, 128))
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds + 1):
        for name in sorted(workers, reverse=turn % 2 == 1):
            done = Done(*workers[name].ask("run", workload.prompts, workload.num_outputs, 0.0, -1, 1.0))
            if turn:  # the first one warms up
                speeds[name].append(workload.num_output_tokens / done.seconds)
    figures = {}
    for name, each in speeds.items():
        ratios = [mine / first for mine, first in zip(each, speeds["before"], strict=True)]
        figures[name] = {
            "tokens_per_second": round(statistics.median(each), 1),
            "of_before": round(statistics.median(ratios), 4),
            "lowest": round(min(ratios), 4),
            "highest": round(max(ratios), 4),
        }
    return figures


def main(
    requests: Annotated[int, typer.Option(min=1, help="How many at once.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 15,
    keep: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/one_process.json.")] = False,
) -> None:
    """Compare the engine of one process with what it was before there were ranks."""
    console = Console()
    came = commit_of_ranks()
    with ExitStack() as stack:
        trees = {"before": stack.enter_context(other_tree(f"{came}^")), "with": stack.enter_context(other_tree(came))}
        workers = {}
        for name, tree in (trees | {"now": ROOT}).items():
            engine = Engine(name, "ours", OPTIONS, directory=tree)
            workers[name] = stack.enter_context(Worker(engine, str(random_checkpoint(SHAPE))))
        versions = in_turns(workers, requests, rounds)
    figures = {"shape": SHAPE, "commit": came, "requests": requests, "rounds": rounds, "versions": versions}
    console.print(figures)
    if keep:
        console.print(f"wrote {save('one_process', 'python -m benchmarks.one_process --save', figures)}")


if __name__ == "__main__":
    typer.run(main)
