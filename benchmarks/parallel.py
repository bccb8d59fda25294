"""What sharing a model out costs and brings on one machine: ``python -m benchmarks.parallel``.

The bundled model, on as many cores as there are ranks: one rank with two threads, beside two ranks with one thread
each, that share layers (tp), follow each other as stages (pp), or are replicas (dp). All engines are there from the
beginning and take turns, so that whatever else the machine does concerns all of them alike; reported is the median of
each round's ratio to the one rank.

Then the router: groups of prompts with a common beginning, on one replica, on two with the router, and on two that take
turns; reported is the share of prompt tokens found in the prefix cache. That is counted, not timed.

And how long it takes until it is noticed that a rank was killed, while nothing is computed and in the middle of steps.
"""

import logging
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.report import save
from mini_infer import LLM, SamplingParams
from mini_infer.engine.replicas import Replicas

LAYOUTS: dict[str, dict[str, int]] = {
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "dp": {"data_parallel_size": 2},
}
CORES = 2
FEW = 4


def draw(requests: int, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 32 to 64 tokens, and answers of as many."""
    draw = random.Random(seed)
    prompts = [[draw.randint(0, 250) for _ in range(draw.randint(32, 64))] for _ in range(requests)]
    return prompts, [SamplingParams(temperature=0, max_tokens=draw.randint(32, 64), ignore_eos=True) for _ in prompts]


def compare(loads: Sequence[int], rounds: int, dtype: str) -> list[dict[str, Any]]:
    """Output tokens per second of each layout, for so many requests at once."""
    torch.set_num_threads(CORES)
    with ExitStack() as stack:
        fields: dict[str, Any] = {"device": "cpu", "dtype": dtype, "num_gpu_blocks": 600}
        engines = {"one": stack.enter_context(LLM(**fields))}
        for name, sizes in LAYOUTS.items():
            engines[name] = stack.enter_context(LLM(**fields, **sizes))
        return [in_turns(engines, requests, rounds) for requests in loads]


def in_turns(engines: Mapping[str, LLM], requests: int, rounds: int) -> dict[str, Any]:
    """The median speed of each engine, and of its ratio to the first one's in the same round."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        prompts, params = draw(requests, turn)
        for name, engine in engines.items():
            began = time.perf_counter()
            outputs = engine.generate(prompts, params, False)
            seconds = time.perf_counter() - began
            if turn:  # the first one warms up
                speeds[name].append(sum(len(output.token_ids) for output in outputs) / seconds)
    return {
        name: {
            "tokens_per_second": statistics.median(each),
            "of_one": statistics.median(mine / one for mine, one in zip(each, speeds["one"], strict=True)),
        }
        for name, each in speeds.items()
    }


class TakingTurns:
    """Instead of a router."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas, self._num_chosen = num_replicas, 0

    def choose(self, request: Any, token_ids: Any, salt: str | None = None) -> int:
        self._num_chosen += 1
        return self._num_chosen % self._num_replicas

    def computed(self, request: Any) -> None:
        pass

    def ended(self, request: Any) -> None:
        pass


def hit_rates(groups: int, each: int) -> dict[str, float]:
    """The share of prompt tokens found, with a beginning of 256 tokens for each group."""
    draw = random.Random(0)
    stems = [[draw.randint(0, 250) for _ in range(256)] for _ in range(groups)]
    prompts = [stem + [draw.randint(0, 250) for _ in range(16)] for stem in stems for _ in range(each)]
    draw.shuffle(prompts)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found = {}
    for name, replicas in (("one", 1), ("router", 2), ("turns", 2)):
        with LLM(
            device="cpu", data_parallel_size=replicas, enable_prefix_caching=True, num_gpu_blocks=1000, max_num_seqs=32
        ) as engine:
            if name == "turns":
                assert isinstance(engine._loop, Replicas)
                engine._loop._router = TakingTurns(replicas)  # type: ignore[assignment]
            engine.generate(prompts, params, False)
            found[name] = engine.stats().prefix_hit_rate
    return found


class Noticed(logging.Handler):
    """When the driver said that it starts ranks anew."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.at: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if "started anew" in record.getMessage():
            self.at = time.perf_counter()


def own_ranks() -> list[int]:
    """Process ids of the ranks of this process, in their order."""
    mine = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return sorted(int(pid) for pid in mine if b"mini_infer.executor.rank" in Path(f"/proc/{pid}/cmdline").read_bytes())


def seconds_until_noticed(layout: str, victim: int, idle: bool) -> float:
    """From the death of a rank until the driver knows of it; what was asked for is answered all the same."""
    prompts, params = draw(64, 0)
    noticed, logger = Noticed(), logging.getLogger("mini_infer.executor.ranks")
    with LLM(device="cpu", num_gpu_blocks=600, **LAYOUTS[layout]) as engine:
        engine.generate(prompts[:8], params[:8], False)
        killed: list[float] = []

        def kill() -> None:
            killed.append(time.perf_counter())
            os.kill(own_ranks()[victim], signal.SIGKILL)

        timer = threading.Timer(0.5, kill)
        logger.addHandler(noticed)
        try:
            if idle:
                kill()
            else:
                timer.start()
            outputs = engine.generate(prompts, params, False)
        finally:
            timer.cancel()
            logger.removeHandler(noticed)
    assert noticed.at is not None and all(output.finish_reason == "length" for output in outputs)
    return noticed.at - killed[0]


def main(
    requests: Annotated[int, typer.Option(min=1, help="How many at once.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    each: Annotated[int, typer.Option(min=1, help="Prompts of each of 16 groups.")] = 16,
    keep: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/parallel.json.")] = False,
) -> None:
    """Measure layouts of two ranks beside one, and the router."""
    console = Console()
    many, few = compare((requests, FEW), rounds, dtype)
    figures: dict[str, Any] = {"requests": requests, "rounds": rounds, "dtype": dtype, "layouts": many}
    figures["few"] = {"requests": FEW, "layouts": few}
    figures |= {"groups": 16, "each": each, "hit_rates": hit_rates(16, each)}
    figures["seconds_until_noticed"] = {
        f"{layout}, rank {victim}, {'idle' if idle else 'in a step'}": seconds_until_noticed(layout, victim, idle)
        for layout in ("tp", "pp")
        for victim in range(2)
        for idle in (True, False)
    }
    console.print(figures)
    if keep:
        console.print(f"wrote {save('parallel', 'python -m benchmarks.parallel --save', figures)}")


if __name__ == "__main__":
    typer.run(main)
