"""Many streaming clients on one server, some of whom leave in the middle: ``python -m benchmarks.serving``.

The server runs in a process of its own, on the bundled model. Clients ask for greedy completions, one after another
(closed loop), or as a Poisson process with ``--rate``. Every answer that was not left must equal the offline engine's;
in float32 the first difference may come where the two best logits lie within 1e-4, and these are counted. Reported:
time to first token, inter-token latency (between two pieces of text), time to the end, throughput, how late the
server's event loop was with what it had to do, its memory, and whether all KV blocks came back.
"""

import asyncio
import json
import multiprocessing
import random
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy
import torch
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.report import save
from mini_infer import LLM, AsyncLLMEngine, GenerateOutput, SamplingParams
from mini_infer.serving import create_app
from mini_infer.serving.server import Server

NEAR_TIE = 1e-4
QUESTIONS = (
    "What is a KV cache?",
    "Why do blocks help?",
    "什么是块？",
    "什么是连续批处理？",
    "How does a scheduler",
    "Once upon",
)
LAG_PAUSE = 0.005
PATIENCE = 600


@dataclass(frozen=True)
class Job:
    """One kind of request, and what the offline engine answers to it."""

    prompt: str
    max_tokens: int
    expected: GenerateOutput


@dataclass
class Tally:
    """What the clients saw; times in seconds."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_left: int = 0
    num_equal: int = 0
    num_near_ties: int = 0
    wrong: list[str] = field(default_factory=list)


# ---- the server ------------------------------------------------------------------------------------------------------


class LoopLag:
    """How much later than asked an event loop runs what is due."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def report(self) -> dict[str, Any]:
        """The samples since the last report; the first one starts it."""
        self._task = self._task or asyncio.create_task(self._sample())
        samples, self._samples = self._samples, []
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "lag": samples,
            "rss_mib": _resident_mib(),
            "peak_rss_mib": peak // (1024 if sys.platform == "linux" else 2**20),
        }

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + LAG_PAUSE
            await asyncio.sleep(LAG_PAUSE)
            self._samples.append(time.perf_counter() - due)


def _resident_mib() -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024


def _serve(pipe: Connection, num_threads: int, fields: dict[str, Any]) -> None:
    torch.set_num_threads(num_threads)
    engine = AsyncLLMEngine(**fields)
    app = create_app(engine)
    app.add_api_route("/loop-lag", LoopLag().report)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        Server(app, engine, drain_timeout=1).run(sockets=[listener])


@contextmanager
def server_process(num_threads: int, fields: dict[str, Any]) -> Iterator[int]:
    """A server in a process of its own; its port."""
    context = multiprocessing.get_context("spawn")
    pipe, its_end = context.Pipe()
    process = context.Process(target=_serve, args=(its_end, num_threads, fields))
    process.start()
    try:
        if not pipe.poll(PATIENCE):
            raise TimeoutError("the server did not start")
        yield pipe.recv()
    finally:
        process.terminate()
        process.join(30)
        process.kill()


# ---- the clients -----------------------------------------------------------------------------------------------------


async def ask(port: int, job: Job, leave_after: int | None, tally: Tally) -> None:
    """Stream one completion over a connection of its own; leave after so many pieces if told to."""
    body = {"prompt": job.prompt, "max_tokens": job.max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    content = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
        )
        text, last, num_pieces = "", 0.0, 0
        async for line in reader:
            if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                tally.wrong.append(line.decode() + (await reader.read()).decode())
                return
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            now = time.perf_counter()
            if "error" in event:
                tally.wrong.append(str(event))
                return
            if event["choices"]:
                (tally.itl if last else tally.ttft).append(now - (last or start))
                last = now
                num_pieces += 1
                text += event["choices"][0]["text"]
            else:
                tally.num_tokens += event["usage"]["completion_tokens"]
            if leave_after == num_pieces:
                tally.num_left += 1
                return
        tally.e2e.append(time.perf_counter() - start)
        judge(job, text, tally)
    finally:
        writer.close()


def judge(job: Job, text: str, tally: Tally) -> None:
    """Compare an answer with the offline engine's."""
    expected = job.expected
    if text == expected.text:
        tally.num_equal += 1
        return
    common = next((i for i, (a, b) in enumerate(zip(text, expected.text, strict=False)) if a != b), len(text))
    length = 0
    for place in expected.logprobs or []:
        entries = list(place.values())
        length += len(entries[0].decoded_token)
        if length > common:
            others = sorted((entry.logprob for entry in entries), reverse=True)
            if others[0] - others[1] <= NEAR_TIE:
                tally.num_near_ties += 1
                return
            break
    tally.wrong.append(f"{job.prompt!r}: {text!r} instead of {expected.text!r}")


async def load(
    port: int, jobs: list[Job], num_requests: int, num_clients: int, rate: float | None, disconnects: float, seed: int
) -> Tally:
    """All requests, by so many clients; or by as many as come, so many per second."""
    draw, tally = random.Random(seed), Tally()
    plan = [(draw.choice(jobs), draw.random() < disconnects, draw.random()) for _ in range(num_requests)]
    requests = iter([(job, 1 + int(where * job.max_tokens / 2) if leaves else None) for job, leaves, where in plan])

    async def client() -> None:
        for job, leave_after in requests:
            await ask(port, job, leave_after, tally)

    if rate is None:
        await asyncio.gather(*(client() for _ in range(num_clients)))
    else:
        tasks = []
        for job, leave_after in requests:
            tasks.append(asyncio.create_task(ask(port, job, leave_after, tally)))
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*tasks)
    return tally


# ---- the measurement -------------------------------------------------------------------------------------------------


def make_jobs(num_jobs: int, seed: int, fields: dict[str, Any]) -> list[Job]:
    """Prompts of 1 to 60 tokens or so, answers of 8 to 48, and what the offline engine says."""
    draw = random.Random(seed)
    prompts = [f"{number} " + " ".join(draw.choices(QUESTIONS, k=draw.randint(1, 6))) for number in range(num_jobs)]
    lengths = [draw.randint(8, 48) for _ in prompts]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=2) for n in lengths]
    outputs = LLM(**fields).generate(prompts, params, use_tqdm=False)
    return [Job(*job) for job in zip(prompts, lengths, outputs, strict=True)]


def scrape(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def measure(
    num_requests: int = 1000,
    num_clients: int = 200,
    rate: float | None = None,
    disconnects: float = 0.3,
    seed: int = 0,
    num_threads: int = 1,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Figures of one run; seconds, unless the name says otherwise."""
    torch.set_num_threads(num_threads)
    fields = {"dtype": dtype, "num_gpu_blocks": 8192, "max_num_seqs": 256, "enable_prefix_caching": True}
    jobs = make_jobs(64, seed, fields)
    with (
        server_process(num_threads, fields) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as http,
    ):
        asyncio.run(load(port, jobs, max(num_clients, num_requests // 10), num_clients, None, disconnects, seed + 1))
        before = http.get("/loop-lag").json()
        start = time.perf_counter()
        tally = asyncio.run(load(port, jobs, num_requests, num_clients, rate, disconnects, seed))
        seconds = time.perf_counter() - start
        after = http.get("/loop-lag").json()
        deadline = time.monotonic() + PATIENCE
        while (metrics := scrape(http))["mini_infer:kv_cache_usage_perc"] and time.monotonic() < deadline:
            pass
    return {
        "requests": num_requests,
        "clients": num_clients,
        "requests_per_second_offered": rate,
        "disconnects": tally.num_left,
        "equal_to_offline": tally.num_equal,
        "near_ties": tally.num_near_ties,
        "wrong": len(tally.wrong),
        "examples_of_wrong": tally.wrong[:3],
        **_percentiles("ttft", tally.ttft),
        **_percentiles("itl", tally.itl),
        **_percentiles("e2e", tally.e2e),
        **_percentiles("event_loop_lag", after["lag"]),
        "output_tokens_per_second": round(tally.num_tokens / seconds, 1),
        "requests_per_second": round(num_requests / seconds, 2),
        "server_rss_mib_before": before["rss_mib"],
        "server_rss_mib_after": after["rss_mib"],
        "kv_blocks_in_use_afterwards": metrics["mini_infer:kv_cache_usage_perc"],
        "sequences_afterwards": metrics["mini_infer:num_requests_running"] + metrics["mini_infer:num_requests_waiting"],
        "threads": num_threads,
        "dtype": dtype,
        "seed": seed,
    }


def _percentiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    return {
        f"{name}_p{percent}": round(float(numpy.percentile(seconds, percent)), 4) if seconds else None
        for percent in (50, 90, 99)
    }


def main(
    requests: Annotated[int, typer.Option(help="Requests in all, after a tenth as many for warming up.")] = 1000,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 200,
    rate: Annotated[float | None, typer.Option(help="Requests per second, as a Poisson process, instead.")] = None,
    disconnects: Annotated[float, typer.Option(help="Share of the clients' requests that are left.")] = 0.3,
    threads: Annotated[int, typer.Option(help="Threads of the model.")] = 1,
    dtype: Annotated[str, typer.Option(help="The model's dtype.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
) -> None:
    figures = measure(requests, clients, rate, disconnects, seed, threads, dtype)
    table = Table("figure", "value", title="serving")
    for figure, value in figures.items():
        table.add_row(figure, str(value))
    console = Console()
    console.print(table)
    command = f"python -m benchmarks.serving --requests {requests} --clients {clients} --threads {threads}"
    console.print(f"written to {save('serving', command + (f' --rate {rate}' if rate else ''), figures)}")
    raise typer.Exit(1 if figures["wrong"] else 0)


if __name__ == "__main__":
    typer.run(main)
