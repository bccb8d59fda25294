"""One caller who wants everything, and one who wants eight tokens each second: ``python -m benchmarks.hostile``.

The server is ``mini-infer serve`` on the bundled model, with at most 1024 open files. Each attack goes on for a while
beside a victim, who asks for eight tokens twice a second; reported are the victim's latencies, what the attackers were
answered, and the server's memory. The bars: the victim's p99 at most three times its p99 alone, memory at most 256 MiB
above that of a server that nobody attacks, and a client beside 1,100 silent connections served within two seconds. All
traffic stays on 127.0.0.1, everything has a number and a time after which it ends, and so has the server.
"""

import asyncio
import contextlib
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import httpx
import numpy
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report import processor, save
from benchmarks.servers import running_server

OPEN_FILES = 1024
SERVER = ("--dtype", "float32", "--num-gpu-blocks", "1024")
MOST_TIMES_ALONE = 3
MOST_MEBIBYTES_MORE = 256
MOST_SECONDS_BESIDE_SILENCE = 2.0
MEBIBYTE = 1 << 20
PATIENCE = 120.0


@dataclass
class Tally:
    """What was seen beside one attack.

    Attributes:
        latencies: of the victim's requests, in seconds.
        failures: the victim's requests that were not answered with its tokens.
        answers: how often the attackers got which status; "closed" where none came.
        rss_before_mib: the server's memory before.
        peak_rss_mib: and at most, looked at twenty times a second.
    """

    latencies: list[float] = field(default_factory=list)
    failures: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    rss_before_mib: float = 0.0
    peak_rss_mib: float = 0.0


Attack: TypeAlias = Callable[["Target", Tally], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Target:
    """A server of our own.

    Attributes:
        port: on 127.0.0.1.
        pid: its process.
        deadline: when attacks end, by ``time.monotonic``.
    """

    port: int
    pid: int
    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status")
        return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024 if status.exists() else 0.0


# ---- the attacks -----------------------------------------------------------------------------------------------------


async def send(target: Target, tally: Tally, path: str, content: bytes, read: bool = True) -> bytes:
    """One request over a connection of its own, given up at the deadline."""
    head = (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % (path.encode(), len(content))
    )
    return await send_bytes(target, tally, head + content, read)


async def send_bytes(target: Target, tally: Tally, content: bytes, read: bool = True) -> bytes:
    async def exchange() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=MEBIBYTE)
        try:
            writer.write(content)
            if not read:
                await asyncio.sleep(target.left)
                return b""
            answer = await reader.readuntil(b"\r\n")
            tally.answers[answer.split()[1].decode()] += 1
            while piece := await reader.read(MEBIBYTE):
                answer = (answer + piece)[: 4 * MEBIBYTE]
            return answer
        finally:
            writer.close()

    try:
        return await asyncio.wait_for(exchange(), max(0.01, target.left))
    except asyncio.TimeoutError:
        tally.answers["unanswered"] += 1
    except (OSError, asyncio.IncompleteReadError):
        tally.answers["closed"] += 1
    return b""


def repeating(path: str, bodies: list[Any], num_clients: int = 4) -> Attack:
    """So many clients, each of whom sends these bodies one after the other, again and again."""
    contents = [json.dumps(body).encode() for body in bodies]

    async def client(target: Target, tally: Tally) -> None:
        for number in range(10_000):
            if target.left <= 0:
                return
            await send(target, tally, path, contents[number % len(contents)])
            await asyncio.sleep(0.01)

    async def attack(target: Target, tally: Tally) -> None:
        await asyncio.gather(*(client(target, tally) for _ in range(num_clients)))

    return attack


async def nobody(target: Target, tally: Tally) -> None:
    await asyncio.sleep(max(0.0, target.left))


async def keep_a_core_busy(target: Target, tally: Tally) -> None:
    """No attack on the server: as much of the machine as attackers take who do nothing but send and read."""
    while target.left > 0:
        sum(range(10_000))


async def fill_the_queue(target: Target, tally: Tally) -> None:
    """Ten batches of a thousand; what was queued is cancelled when the time is over."""
    body = json.dumps({"prompts": ["Once"] * 1024, "max_tokens": 100, "ignore_eos": True}).encode()
    patient = replace(target, deadline=target.deadline + PATIENCE / 2)
    answers = await asyncio.gather(*(send(patient, tally, "/v1/generate_batch", body) for _ in range(10)))
    await asyncio.sleep(max(0.0, target.left))
    queued = [answer.partition(b"\r\n\r\n")[2] for answer in answers if answer.startswith(b"HTTP/1.1 200")]
    numbers = [number for content in queued for number in json.loads(content)["request_ids"]]
    few = httpx.Limits(max_connections=20)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{target.port}", timeout=PATIENCE, limits=few) as http:
        await asyncio.gather(*(http.delete(f"/v1/result/{number}") for number in numbers))


async def never_read(target: Target, tally: Tally) -> None:
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "n": 4, "logprobs": 20, "stream": True}
    content = json.dumps(body).encode()
    await asyncio.gather(*(send(target, tally, "/v1/completions", content, read=False) for _ in range(30)))


async def hold_back_bodies(target: Target, tally: Tally) -> None:
    size = 4 * MEBIBYTE
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    content = head + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 100)

    await asyncio.gather(*(send_bytes(target, tally, content) for _ in range(150)))


async def say_nothing(target: Target, tally: Tally) -> None:
    """1,100 connections, and as many again for those that were closed."""
    writers = []
    for _ in range(1100):
        with contextlib.suppress(OSError):
            writers.append((await asyncio.open_connection("127.0.0.1", target.port))[1])
    tally.answers["connected"] += len(writers)
    await asyncio.sleep(max(0.0, target.left))
    for writer in writers:
        writer.close()


_BIAS = {"prompt": "Once", "max_tokens": 30, "ignore_eos": True, "n": 256}
_STOPS = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}
_MESSAGE = {"role": "user", "content": ""}

ATTACKS: dict[str, Attack] = {
    "nobody": nobody,
    "a busy core": keep_a_core_busy,
    "logit_bias": repeating(
        "/v1/completions",
        [_BIAS | {"logit_bias": {str(i): 0.001 for i in range(size)}} for size in (4096, 1024)],
        num_clients=1,
    ),
    "stop_token_ids": repeating(
        "/v1/completions", [_BIAS | {"min_tokens": 30, "stop_token_ids": list(range(1000, 2024))}], num_clients=1
    ),
    "tokenize": repeating("/tokenize", [{"prompt": "hello world " * n} for n in (340_000, 21_000)], num_clients=8),
    "detokenize": repeating("/detokenize", [{"tokens": [5] * n} for n in (1_000_000, 65_536)], num_clients=8),
    "answers": repeating(
        "/v1/completions",
        [{"prompt": "Once", "max_tokens": 150, "n": n, "logprobs": 20, "ignore_eos": True} for n in (512, 256)],
        num_clients=2,
    ),
    "queue": fill_the_queue,
    "stop strings": repeating(
        "/v1/completions",
        [
            _STOPS | {"stop": ["a" * n + "!"] + ["b" + "a" * (n - 2) + chr(99 + i) for i in range(63)]}
            for n in (60_000, 511)
        ],
        num_clients=2,
    ),
    "validation": repeating("/v1/chat/completions", [{"prompt": [[1]] * 800_000}, {"messages": [_MESSAGE] * 110_000}]),
    "never reading": never_read,
    "bodies": hold_back_bodies,
    "silence": say_nothing,
}


# ---- the victim ------------------------------------------------------------------------------------------------------


async def be_a_victim(target: Target, tally: Tally, period: float) -> None:
    body = {"prompt": "Once", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    while target.left > 0:
        start = time.monotonic()
        try:
            async with httpx.AsyncClient(timeout=PATIENCE) as http:  # a new connection each time
                answer = await http.post(f"http://127.0.0.1:{target.port}/v1/completions", json=body)
            tally.failures += answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 8
        except httpx.HTTPError:
            tally.failures += 1
        tally.latencies.append(time.monotonic() - start)
        await asyncio.sleep(max(0.0, period - tally.latencies[-1]))


async def watch_memory(target: Target, tally: Tally) -> None:
    while True:
        tally.peak_rss_mib = max(tally.peak_rss_mib, target.rss_mib())
        await asyncio.sleep(0.05)


def attack_alone(name: str, target: Target) -> Counter[str]:
    """One attack, in a process of its own: the victim must not wait for its attackers' own work."""
    tally = Tally()
    asyncio.run(ATTACKS[name](target, tally))
    return tally.answers


@contextmanager
def attackers_process() -> Iterator[ProcessPoolExecutor]:
    """Where attacks run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as attackers:
        attackers.submit(attack_alone, "nobody", Target(0, 0, 0.0)).result()  # it has started
        yield attackers


async def run_attack(
    name: str, attackers: ProcessPoolExecutor, port: int, pid: int, seconds: float, period: float
) -> Tally:
    """One attack beside the victim; then wait until the server has nothing left to do."""
    tally = Tally()
    target = Target(port, pid, time.monotonic() + seconds)
    tally.rss_before_mib = target.rss_mib()
    watching = asyncio.create_task(watch_memory(target, tally))
    try:
        attack = asyncio.get_running_loop().run_in_executor(attackers, attack_alone, name, target)
        await be_a_victim(target, tally, period)
        tally.answers = await asyncio.wait_for(attack, PATIENCE)
        await until_idle(port)
    finally:
        watching.cancel()
    return tally


async def until_idle(port: int) -> None:
    names = ("running", "waiting", "queued")
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
                lines = [line for line in text.splitlines() if line.startswith("mini_infer:num_requests_")]
                if lines and all(line.endswith(" 0.0") for line in lines if any(name in line for name in names)):
                    return
            await asyncio.sleep(0.1)
    raise TimeoutError("the server still works for attackers who have left")


# ---- the report ------------------------------------------------------------------------------------------------------


def measure(names: list[str], seconds: float, period: float, threads: int) -> dict[str, dict[str, Any]]:
    """Figures of each attack, the first being none; one server meets all of them."""
    figures: dict[str, dict[str, Any]] = {}
    with (
        running_server(*SERVER, num_threads=threads, open_files=OPEN_FILES) as (port, pid),
        attackers_process() as attackers,
    ):
        asyncio.run(run_attack("nobody", attackers, port, pid, 2.0, 0.05))  # does not count
        for name in names:
            tally = asyncio.run(run_attack(name, attackers, port, pid, seconds, period))
            milliseconds = [1e3 * latency for latency in tally.latencies]
            figures[name] = {
                "requests": len(milliseconds),
                "failures": tally.failures,
                **{f"p{q}_ms": round(float(numpy.percentile(milliseconds, q)), 1) for q in (50, 99)},
                "max_ms": round(max(milliseconds), 1),
                "rss_before_mib": round(tally.rss_before_mib, 1),
                "peak_rss_mib": round(tally.peak_rss_mib, 1),
                "answers": dict(sorted(tally.answers.items())),
            }
            figures[name]["missed"] = missed(name, figures)
    return figures


def missed(name: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    """Which of the bars an attack has got over."""
    alone, row = figures["nobody"], figures[name]
    bars = {
        "failures": row["failures"] > 0,
        "p99": row["p99_ms"] > MOST_TIMES_ALONE * alone["p99_ms"],
        "memory": row["peak_rss_mib"] > alone["peak_rss_mib"] + MOST_MEBIBYTES_MORE,
        "two seconds": name == "silence" and row["max_ms"] > 1e3 * MOST_SECONDS_BESIDE_SILENCE,
    }
    return [bar for bar, is_missed in bars.items() if is_missed]


def main(
    seconds: Annotated[float, typer.Option(min=1, max=120, help="How long each attack goes on.")] = 20.0,
    period: Annotated[float, typer.Option(min=0.05, help="Seconds between two of the victim's requests.")] = 0.5,
    only: Annotated[list[str] | None, typer.Option(help="These attacks; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the model.")] = 1,
    keep: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/hostile-PROCESSOR.json.")] = False,
) -> None:
    """Run the attacks, print a table, and fail if a bar was missed."""
    names = ["nobody", *(name for name in ATTACKS if name != "nobody" and (not only or name in only))]
    figures = measure(names, seconds, period, threads)
    columns = ("requests", "failures", "p50_ms", "p99_ms", "max_ms", "rss_before_mib", "peak_rss_mib")
    table = Table("attack", *columns, "attackers' answers", "missed")
    for name, row in figures.items():
        shown = ", ".join(f"{status}: {number}" for status, number in row["answers"].items())
        table.add_row(name, *(str(row[column]) for column in columns), shown, ", ".join(row["missed"]))
    Console(width=200).print(table)
    if keep:
        command = f"python -m benchmarks.hostile --seconds {seconds:g} --period {period:g} --threads {threads} --save"
        save(f"hostile-{processor()}", command, figures)
    raise typer.Exit(1 if any(row["missed"] for row in figures.values()) else 0)


if __name__ == "__main__":
    typer.run(main)
