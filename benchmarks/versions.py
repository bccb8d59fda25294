"""What a change costs a busy server: ``python -m benchmarks.versions COMMIT``.

The server of another commit and that of this tree run side by side, both on this tree's bundled model. Many clients
load one of them, then the other, in turns; the figure is the median of the rounds' own ratios, with their spread, so
that whatever else the machine does hits both. Who goes first alternates.
"""

import asyncio
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.report import processor, save
from benchmarks.servers import HERE, running_server
from mini_infer.config import BUNDLED_MODEL

NUM_TOKENS = 32


@contextmanager
def other_tree(commit: str) -> Iterator[Path]:
    """The files of another commit, for a while."""
    with tempfile.TemporaryDirectory() as directory:
        files = subprocess.run(["git", "archive", commit, "mini_infer"], cwd=HERE, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", directory], input=files.stdout, check=True)
        yield Path(directory)


async def load(port: int, num_clients: int, num_requests: int) -> float:
    """Tokens per second of so many clients, who stream one completion after the other, each over a connection of its
    own.

    Raises:
        RuntimeError: one was not answered in full.
    """
    numbers = iter(range(num_requests))

    async def client() -> None:
        for number in numbers:
            prompt = f"{number} What does a scheduler of requests decide in each step, and why?"
            body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
            content = json.dumps(body).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
            )
            answer = await reader.read()
            writer.close()
            if not answer.startswith(b"HTTP/1.1 200") or b"[DONE]" not in answer or b'"error"' in answer:
                raise RuntimeError(f"request {number} was not answered in full: {answer[:300]!r}")

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return num_requests * NUM_TOKENS / (time.perf_counter() - start)


def main(
    commit: Annotated[str, typer.Argument(help="What this tree is compared with.")],
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 200,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a round.")] = 600,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the model.")] = 1,
    keep: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/versions-PROCESSOR.json.")] = False,
) -> None:
    """Compare the throughput of two versions of the server."""
    options = ["--model", BUNDLED_MODEL, "--dtype", "float32", "--num-gpu-blocks", "4096"]
    rates: dict[str, list[float]] = {"before": [], "after": []}
    with (
        other_tree(commit) as tree,
        running_server(*options, tree=tree, num_threads=threads) as before,
        running_server(*options, num_threads=threads) as after,
    ):
        ports = {"before": before.port, "after": after.port}
        for number in range(rounds + 1):
            for name in sorted(ports, reverse=number % 2 == 1):
                rate = asyncio.run(load(ports[name], clients, requests))
                if number:
                    rates[name].append(round(rate, 1))
    ratios = [after / before for before, after in zip(rates["before"], rates["after"], strict=True)]
    middle, lowest, highest = statistics.median(ratios), min(ratios), max(ratios)
    shown = f"{middle:.3f} of {commit}'s ({lowest:.3f} to {highest:.3f} in {rounds} rounds)"
    Console().print(f"this tree's throughput is {shown}")
    if keep:
        command = f"python -m benchmarks.versions {commit} --clients {clients} --requests {requests} --rounds {rounds}"
        figures = {"tokens_per_second_of_each_round": rates, "ratio": round(middle, 4), "clients": clients}
        figures |= {"lowest_ratio": round(lowest, 4), "highest_ratio": round(highest, 4)}
        save(f"versions-{processor()}", f"{command} --threads {threads} --save", figures)


if __name__ == "__main__":
    typer.run(main)
