"""``mini-infer bench``: how fast a model runs here or on a server, and how fast this machine could run it."""

import http.client
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.cli.roofline import Floor, Machine, floor
from mini_infer.cli.workload import Workload
from mini_infer.config import BUNDLED_MODEL
from mini_infer.engine.stats import EngineStats
from mini_infer.exceptions import InvalidConfigError, InvalidRequestError, MiniInferError
from mini_infer.executor.device import resolve_dtype
from mini_infer.fields import check_number
from mini_infer.outputs import Increment

PERCENTILES = (50, 90, 99)

WARM_UP_REQUESTS, WARM_UP_TOKENS = 16, 4


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
class Step:
    """Seconds that a step took; tokens it computed, negative if it only decoded."""

    seconds: float
    num_tokens: int


def run_bench(
    config: EngineConfig,
    workload: Workload,
    sampling: SamplingParams,
    console: Console,
    as_json: bool,
    *,
    url: str | None,
    api_key: str | None,
    concurrency: int | None,
    request_rate: float | None,
) -> None:
    """Run a workload, offline or against the server at ``url``, and print what came of it.

    Raises:
        InvalidConfigError: flags that mean nothing together.
        InvalidRequestError: the model cannot take such requests.
        MiniInferError: the server cannot be used.
    """
    if url is None:
        for name, value in (("concurrency", concurrency), ("request_rate", request_rate)):
            if value is not None:
                raise InvalidConfigError(f"{name}={value} is about a server; add --url, or set --max-num-seqs")
        report = bench_engine(config, workload, sampling)
    else:
        if config != EngineConfig(model=config.model, seed=config.seed):
            raise InvalidConfigError("flags of the engine mean nothing with --url: the server has its own")
        model = None if config.model == BUNDLED_MODEL else str(config.model)
        if request_rate is not None:
            check_number(InvalidConfigError, "request_rate", request_rate, 0, open_low=True)
        server = Server.at(url, api_key, model)
        report = bench_server(server, workload, sampling, concurrency, request_rate, config.seed)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report, console)


# ---- offline -------------------------------------------------------------------------------------------------------


def bench_engine(config: EngineConfig, workload: Workload, sampling: SamplingParams) -> dict[str, Any]:
    """Everything queued at once in an engine of this process; its speed beside the machine's limits."""
    begin = time.perf_counter()
    engine = LLMEngine(config)
    load_seconds = time.perf_counter() - begin
    for prompt, num_output in zip(workload.prompts, workload.num_outputs, strict=True):
        if len(prompt) + num_output > engine.max_model_len:
            raise InvalidRequestError(
                f"a prompt of {len(prompt)} tokens and {num_output} more do not fit max_model_len, which is "
                f"{engine.max_model_len}; lower --input-len or --output-len"
            )

    first = WARM_UP_REQUESTS
    warm_up = Workload(
        [prompt[::-1] for prompt in workload.prompts[:first]],  # reversed: not what a prefix cache knows later
        [min(n, WARM_UP_TOKENS) for n in workload.num_outputs[:first]],
    )
    run_engine(engine, warm_up, sampling)
    dtype = resolve_dtype(config.dtype, engine.model_config.dtype, engine.device)
    machine = Machine.measure(engine.device, dtype)
    before = engine.stats()
    begin = time.perf_counter()
    timelines, steps = run_engine(engine, workload, sampling)
    seconds = time.perf_counter() - begin
    after = engine.stats()
    machine = machine.best(Machine.measure(engine.device, dtype))  # a machine that others use wanders
    least = floor(engine.model_config, dtype.itemsize, workload, machine, config.max_num_seqs)
    return {
        "model": str(config.model),
        "device": str(engine.device),
        "dtype": str(dtype).removeprefix("torch."),
        "load_seconds": load_seconds,
        **_figures(timelines, seconds),
        "steps": _step_figures(steps, before, after),
        "roofline": _roofline(machine, least, workload, seconds),
    }


def run_engine(engine: LLMEngine, workload: Workload, sampling: SamplingParams) -> tuple[list[Timeline], list[Step]]:
    """Queue all requests, then step until they have ended."""
    arrival = time.perf_counter()
    timelines = [Timeline(len(prompt), arrival) for prompt in workload.prompts]

    def note(timeline: Timeline) -> Callable[[Increment], None]:
        return lambda increment: timeline.add(time.perf_counter(), len(increment.token_ids))

    requests = [
        engine.make_request(prompt, replace(sampling, max_tokens=num_output, ignore_eos=True), listener=note(timeline))
        for prompt, num_output, timeline in zip(workload.prompts, workload.num_outputs, timelines, strict=True)
    ]
    for request in requests:
        engine.submit(request)
    steps, begin = [], time.perf_counter()
    while not engine.is_finished():
        _, num_tokens = engine.step()
        now = time.perf_counter()
        steps.append(Step(now - begin, num_tokens))
        begin = now
    return timelines, steps


def _step_figures(steps: list[Step], before: EngineStats, after: EngineStats) -> dict[str, Any]:
    decodes = [step.seconds for step in steps if step.num_tokens < 0]
    others = [step.seconds for step in steps if step.num_tokens > 0]
    return {
        "count": len(steps),
        "tokens_mean": sum(abs(step.num_tokens) for step in steps) / len(steps),
        "only_decode_seconds": _spread(decodes),
        "with_prompts_seconds": _spread(others),
        "num_blocks": after.num_blocks,
        "peak_used_blocks": after.peak_used_blocks,
        "preemptions": after.num_preemptions - before.num_preemptions,
    }


def _roofline(machine: Machine, least: Floor, workload: Workload, seconds: float) -> dict[str, Any]:
    return {
        **asdict(machine),
        **asdict(least.work),
        "fewest_steps": least.steps,
        "memory_seconds": least.memory_seconds,
        "compute_seconds": least.compute_seconds,
        "floor_seconds": least.seconds,
        "output_tokens_per_second": workload.num_output_tokens / least.seconds,
        "limit": least.limit,
        "share": least.seconds / seconds,
    }


# ---- against a server ----------------------------------------------------------------------------------------------


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
        **_figures(timelines, seconds),
        "asked_output_tokens": workload.num_output_tokens,
        "failed": len(failures),
        "first_failure": failures[0] if failures else None,
    }


# ---- what is printed -----------------------------------------------------------------------------------------------


def _figures(timelines: Sequence[Timeline], seconds: float) -> dict[str, Any]:
    tokens_in = sum(timeline.num_input for timeline in timelines)
    tokens_out = sum(len(timeline.tokens) for timeline in timelines)
    return {
        "requests": len(timelines),
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "seconds": seconds,
        "requests_per_second": len(timelines) / seconds,
        "input_tokens_per_second": tokens_in / seconds,
        "output_tokens_per_second": tokens_out / seconds,
        "total_tokens_per_second": (tokens_in + tokens_out) / seconds,
        "ttft_seconds": _spread([timeline.ttft for timeline in timelines]),
        "itl_seconds": _spread([gap for timeline in timelines for gap in timeline.gaps]),
        "e2e_seconds": _spread([timeline.latency for timeline in timelines]),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    points = np.percentile(values, PERCENTILES).tolist()
    return {"mean": float(np.mean(values))} | {f"p{p}": point for p, point in zip(PERCENTILES, points, strict=True)}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a report as tables."""
    where = report.get("url") or f"{report['device']}, {report['dtype']}"
    console.print(f"[bold]{escape(report['model'])}[/bold] · {where}", highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("requests · 请求", f"{report['requests']} ({report['requests_per_second']:.2f}/s)")
    if report.get("failed"):
        table.add_row("failed · 失败", f"[red]{report['failed']}[/red]")
    elif report.get("asked_output_tokens", 0) > report["output_tokens"]:
        table.add_row("tokens asked for · 要求的词元", f"[red]{report['asked_output_tokens']:,}[/red]")
    table.add_row("duration · 时长", f"{report['seconds']:.2f} s")
    for name, label in (("input", "tokens in · 输入词元"), ("output", "tokens out · 输出词元")):
        per_second = report[f"{name}_tokens_per_second"]
        table.add_row(label, f"{report[f'{name}_tokens']:,}  ({per_second:,.1f}/s)")
    table.add_row("all tokens · 词元合计", f"{report['total_tokens_per_second']:,.1f}/s")
    if "load_seconds" in report:
        table.add_row("loading · 加载", f"{report['load_seconds']:.2f} s")
    console.print(table, highlight=False)

    table = Table(title="Time · 时间", title_justify="left", title_style="bold")
    table.add_column()
    for column in ("mean", *(f"p{p}" for p in PERCENTILES)):
        table.add_column(column, justify="right")
    steps = report.get("steps", {})
    for label, spread in (
        ("TTFT · 首词元时间", report["ttft_seconds"]),
        ("ITL · 词元间隔", report["itl_seconds"]),
        ("E2E · 整个请求", report["e2e_seconds"]),
        ("decode step · 解码步", steps.get("only_decode_seconds")),
        ("prompt step · 提示词步", steps.get("with_prompts_seconds")),
    ):
        if spread is not None:
            table.add_row(label, *(f"{value * 1e3:,.1f} ms" for value in spread.values()))
    console.print(table)
    if steps:
        console.print(
            f"{steps['count']} steps of {steps['tokens_mean']:.1f} tokens on average; at most "
            f"{steps['peak_used_blocks']} of {steps['num_blocks']} KV blocks used; {steps['preemptions']} preemptions\n"
            f"共 {steps['count']} 步，平均每步 {steps['tokens_mean']:.1f} 个词元；KV 块最多占用 "
            f"{steps['peak_used_blocks']}/{steps['num_blocks']}；抢占 {steps['preemptions']} 次",
            highlight=False,
            soft_wrap=True,
        )
    if report.get("first_failure"):
        console.print(f"first failure · 首个失败: {report['first_failure']}", style="red", markup=False, soft_wrap=True)
    if "roofline" in report:
        _show_roofline(report["roofline"], console)


def _show_roofline(roofline: Mapping[str, Any], console: Console) -> None:
    table = Table(title="\nRoofline · 屋顶线", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "machine · 本机",
        f"{roofline['bytes_per_second'] / 1e9:,.1f} GB/s, {roofline['flops_per_second'] / 1e12:,.3f} TFLOP/s "
        "(measured · 实测)",
    )
    table.add_row(
        "to move · 须搬运",
        f"weights · 权重 {roofline['weight_bytes'] / 1e9:,.2f} GB, KV {roofline['kv_bytes'] / 1e9:,.2f} GB",
    )
    table.add_row(
        "to compute · 须计算",
        f"linear · 线性层 {roofline['linear_flops'] / 1e12:,.3f} TFLOP, "
        f"attention · 注意力 {roofline['attention_flops'] / 1e12:,.3f} TFLOP",
    )
    table.add_row(
        "at best · 上限",
        f"{roofline['floor_seconds']:.2f} s, {roofline['output_tokens_per_second']:,.1f} tokens/s, "
        f"{roofline['fewest_steps']} steps",
    )
    console.print(table, highlight=False)
    english, chinese = {
        "memory": ("reading memory", "内存读取"),
        "compute": ("arithmetic", "算力"),
    }[roofline["limit"]]
    share = roofline[f"{roofline['limit']}_seconds"] / roofline["floor_seconds"]
    console.print(
        f"You are at [bold green]{roofline['share']:.0%}[/bold green] of what this machine can do; {english} is the "
        f"limit for {share:.0%} of that time.\n"
        f"已达到本机能力的 [bold green]{roofline['share']:.0%}[/bold green]；其中 {share:.0%} 的时间受{chinese}限制。",
        highlight=False,
        soft_wrap=True,
    )
