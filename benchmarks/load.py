"""How fast a server is for many clients: ``python -m benchmarks.load http://127.0.0.1:8000``.

Any OpenAI-compatible server will do that streams ``/v1/completions``, accepts token ids as a prompt and knows
``ignore_eos``. The workload is that of ``mini-infer bench``.
"""

import http.client
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console

from mini_infer import SamplingParams
from mini_infer.cli.bench import WARM_UP_TOKENS, Workload, parse_range, show, spread, throughput
from mini_infer.cli.group import Command
from mini_infer.exceptions import InvalidConfigError, MiniInferError
from mini_infer.fields import check_number

app = typer.Typer(add_completion=False)


@dataclass
class Timeline:
    """What a client saw of one request; seconds of one clock.

    Attributes:
        num_input: tokens of the prompt.
        arrival: when it was asked.
        tokens: when each token came.
    """

    num_input: int
    arrival: float
    tokens: list[float] = field(default_factory=list)

    def add(self, now: float, num_tokens: int) -> None:
        """Note tokens that came at once; they share the time since the ones before."""
        before = self.tokens[-1] if self.tokens else now
        self.tokens.extend(before + (now - before) * (i + 1) / num_tokens for i in range(num_tokens))

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.arrival

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def latency(self) -> float:
        return self.tokens[-1] - self.arrival


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        url: without ``/v1``.
        headers: of every request.
        model: what it calls the model to ask.
    """

    url: str
    headers: Mapping[str, str]
    model: str

    @classmethod
    def at(cls, url: str, api_key: str | None, model: str | None) -> "Server":
        """The server at a URL, with its first model unless one is named.

        Raises:
            MiniInferError: nobody answers there, or not as expected.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidConfigError(f"url must be like http://127.0.0.1:8000, got {url!r}")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        server = cls(url.rstrip("/").removesuffix("/v1"), headers, model or "")
        if model is not None:
            return server
        with server.ask("GET", "/v1/models") as response:
            try:
                return cls(server.url, headers, json.load(response)["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise MiniInferError(f"{server.url}/v1/models does not list a model; name one") from error

    @contextmanager
    def ask(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the response can be read within the block.

        Raises:
            MiniInferError: nobody answers, or with another status than 200.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port)
        try:
            connection.request(method, parts.path + path, body and json.dumps(body), dict(self.headers))
            response = connection.getresponse()
            if response.status != 200:
                answer = response.read(2000).decode(errors="replace")
                raise MiniInferError(f"{self.url}{path} answers {response.status} {response.reason}: {answer}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise MiniInferError(f"{self.url} does not answer: {error!r}; mini-infer serve starts a server") from error
        finally:
            connection.close()

    def complete(self, prompt: list[int], num_output: int, sampling: SamplingParams, arrival: float) -> Timeline:
        """Stream one completion.

        Raises:
            MiniInferError: it fails, or ends before its time.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": num_output,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.top_k > 0:  # not every server knows it
            body["top_k"] = sampling.top_k
        timeline = Timeline(len(prompt), arrival)
        with self.ask("POST", "/v1/completions", body) as response:
            for event in _events(response):
                now = time.perf_counter()
                if "error" in event:
                    raise MiniInferError(f"{self.url} failed within an answer: {event['error']}")
                usage = event.get("usage")
                text = any(choice.get("text") for choice in event.get("choices", ()))
                # A server that does not count as it goes sends a token per event.
                come = usage["completion_tokens"] - len(timeline.tokens) if usage else int(text)
                if come > 0:
                    timeline.add(now, come)
        if not timeline.tokens:
            raise MiniInferError(f"{self.url} answered without a token")
        return timeline


def _events(response: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)


def bench_server(
    server: Server,
    workload: Workload,
    sampling: SamplingParams,
    concurrency: int | None,
    request_rate: float | None,
    seed: int,
) -> dict[str, Any]:
    """Ask a server as many clients would.

    Args:
        concurrency: most requests on their way at once; None is all.
        request_rate: requests that come per second, at random (a Poisson process); None lets them all come at once.
            A request's latency counts from when it came, even if it then waited for one of ``concurrency`` places.
        seed: of the arrivals.
    """
    server.complete(workload.prompts[0][-1:], WARM_UP_TOKENS, sampling, time.perf_counter())  # and it can be asked
    draw = random.Random(seed)
    num_requests = len(workload.prompts)
    failures: list[str] = []

    def ask(prompt: list[int], num_output: int, due: float | None) -> Timeline | None:
        try:
            return server.complete(prompt, num_output, sampling, time.perf_counter() if due is None else due)
        except MiniInferError as error:
            failures.append(str(error))
            return None

    begin = due = time.perf_counter()
    with ThreadPoolExecutor(min(concurrency or num_requests, num_requests)) as clients:
        answers = []
        for prompt, num_output in zip(workload.prompts, workload.num_outputs, strict=True):
            if request_rate is not None:
                due += draw.expovariate(request_rate)
                time.sleep(max(0.0, due - time.perf_counter()))
            answers.append(clients.submit(ask, prompt, num_output, due if request_rate is not None else None))
        timelines = [timeline for answer in answers if (timeline := answer.result()) is not None]
    seconds = time.perf_counter() - begin
    if not timelines:
        raise MiniInferError(f"all {num_requests} requests failed; the first: {failures[0]}")
    return {
        "url": server.url,
        "model": server.model,
        "concurrency": concurrency,
        "request_rate": request_rate,
        **throughput(
            len(timelines),
            sum(timeline.num_input for timeline in timelines),
            sum(len(timeline.tokens) for timeline in timelines),
            seconds,
        ),
        "ttft_seconds": spread([timeline.ttft for timeline in timelines]),
        "itl_seconds": spread([gap for timeline in timelines for gap in timeline.gaps]),
        "e2e_seconds": spread([timeline.latency for timeline in timelines]),
        "asked_output_tokens": workload.num_output_tokens,
        "failed": len(failures),
        "first_failure": failures[0] if failures else None,
    }


# ---- the command line ----------------------------------------------------------------------------------------------


@app.command(cls=Command)
def main(
    url: Annotated[str, typer.Argument(help="Of the server, such as http://127.0.0.1:8000.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="What it calls the model; by default its first.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MINI_INFER_API_KEY", help="Of the server.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 16,
    input_len: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens of each prompt.")] = "32:256",
    output_len: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens to generate for each.")] = "16:128",
    temperature: Annotated[float, typer.Option(min=0, help="How tokens are chosen; 0 takes the likeliest.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest; -1 keeps all.")] = -1,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest up to this probability.")] = 1.0,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests on their way at once.")] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Requests per second, at random; else all come at once.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the workload and the arrivals.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask a server as many clients would, and report its throughput and latency."""
    if request_rate is not None:
        check_number(InvalidConfigError, "request_rate", request_rate, 0, open_low=True)
    ranges = parse_range("input_len", input_len), parse_range("output_len", output_len)
    workload = Workload.draw(requests, *ranges, seed)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    report = bench_server(Server.at(url, api_key, model), workload, sampling, concurrency, request_rate, seed)
    if json_:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    show(report, console)
    if report["failed"]:
        first = f"failed · 失败: {report['failed']}; first · 首个: {report['first_failure']}"
        console.print(first, style="red", markup=False, soft_wrap=True)
    elif report["asked_output_tokens"] > report["output_tokens"]:
        asked = f"tokens asked for · 要求的词元: {report['asked_output_tokens']:,}"
        console.print(asked, style="red", highlight=False)


if __name__ == "__main__":
    app()
