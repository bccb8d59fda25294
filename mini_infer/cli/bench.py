"""``mini-infer bench``: how fast a model runs here. Servers, limits and peers are measured by ``benchmarks/``."""

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mini_infer import EngineConfig, LLMEngine, SamplingParams, kernels
from mini_infer.exceptions import InvalidConfigError, InvalidRequestError
from mini_infer.executor.device import resolve_dtype

PERCENTILES = (50, 90, 99)
WARM_UP_REQUESTS, WARM_UP_TOKENS = 16, 4

Range: TypeAlias = tuple[int, int]
"""Lowest and highest length, both inclusive."""


@dataclass(frozen=True)
class Workload:
    """Requests that anybody can draw again, asked at once.

    Attributes:
        prompts: token ids of each request, from 0 to 250: ids that every vocabulary has.
        num_outputs: tokens to generate for each, whatever they are.
    """

    prompts: list[list[int]]
    num_outputs: list[int]

    @classmethod
    def draw(cls, num_requests: int, input_len: Range, output_len: Range, seed: int = 0) -> "Workload":
        """Draw the prompts one after the other, each its length and then its ids; then the output lengths."""
        draw = random.Random(seed)
        prompts = [[draw.randint(0, 250) for _ in range(draw.randint(*input_len))] for _ in range(num_requests)]
        return cls(prompts, [draw.randint(*output_len) for _ in range(num_requests)])

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.num_outputs)


def parse_range(name: str, text: str) -> Range:
    """``"32:256"`` or ``"32"`` as a range of lengths.

    Raises:
        InvalidConfigError: it is no such thing; the message calls it ``name``.
    """
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise InvalidConfigError(f"{name} must be LOW:HIGH with 1 <= LOW <= HIGH, or one number; got {text!r}")
    return bounds


def run_bench(
    config: EngineConfig, workload: Workload, sampling: SamplingParams, console: Console, as_json: bool
) -> None:
    """Run a workload and print what came of it.

    Raises:
        InvalidRequestError: the model cannot take such requests.
    """
    begin = time.perf_counter()
    engine = LLMEngine(config)
    report = {"load_seconds": time.perf_counter() - begin, **measure(engine, workload, sampling)}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report, console)


def measure(engine: LLMEngine, workload: Workload, sampling: SamplingParams) -> dict[str, Any]:
    """Everything queued at once, after a short warm-up that does not count; times in seconds."""
    longest = max(len(prompt) + n for prompt, n in zip(workload.prompts, workload.num_outputs, strict=True))
    if longest > engine.max_model_len:
        raise InvalidRequestError(
            f"a prompt and its answer of {longest} tokens do not fit max_model_len, which is {engine.max_model_len}; "
            "lower --input-len or --output-len"
        )
    first = [prompt[::-1] for prompt in workload.prompts[:WARM_UP_REQUESTS]]  # not what a prefix cache knows later
    engine.generate(first, replace(sampling, max_tokens=min(WARM_UP_TOKENS, *workload.num_outputs), ignore_eos=True))
    params = [replace(sampling, max_tokens=n, ignore_eos=True) for n in workload.num_outputs]
    before, begin = engine.stats(), time.perf_counter()
    outputs = engine.generate(workload.prompts, params, use_tqdm=False)
    seconds, after = time.perf_counter() - begin, engine.stats()
    counts = [len(output.token_ids) for output in outputs]
    ttft = [output.metrics.time_to_first_token or 0.0 for output in outputs]
    latency = [output.metrics.latency for output in outputs]
    chosen = kernels.resolve(engine.device, engine.config.kernel_backend)
    between = [(last - one) / (n - 1) for last, one, n in zip(latency, ttft, counts, strict=True) if n > 1]
    return {
        "model": str(engine.config.model),
        "device": str(engine.device),
        "dtype": str(resolve_dtype(engine.config.dtype, engine.model_config.dtype, chosen)).partition(".")[2],
        **throughput(len(outputs), workload.num_input_tokens, sum(counts), seconds),
        "ttft_seconds": spread(ttft),
        "tpot_seconds": spread(between),
        "e2e_seconds": spread(latency),
        "steps": after.num_steps - before.num_steps,
        "num_blocks": after.num_blocks,
        "peak_used_blocks": after.peak_used_blocks,
        "preemptions": after.num_preemptions - before.num_preemptions,
    }


def throughput(num_requests: int, num_input: int, num_output: int, seconds: float) -> dict[str, Any]:
    """How much was done in this time, in all and per second."""
    return {
        "requests": num_requests,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "seconds": seconds,
        "requests_per_second": num_requests / seconds,
        "input_tokens_per_second": num_input / seconds,
        "output_tokens_per_second": num_output / seconds,
        "total_tokens_per_second": (num_input + num_output) / seconds,
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    points = np.percentile(values, PERCENTILES).tolist()
    return {"mean": float(np.mean(values))} | {f"p{p}": point for p, point in zip(PERCENTILES, points, strict=True)}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print what ``measure`` or the load generator found as tables."""
    where = report.get("url") or f"{report['device']}, {report['dtype']}"
    console.print(f"[bold]{escape(report['model'])}[/bold] · {where}", highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_row("requests · 请求", f"{report['requests']} ({report['requests_per_second']:.2f}/s)")
    table.add_row("duration · 时长", f"{report['seconds']:.2f} s")
    for name, label in (("input", "tokens in · 输入词元"), ("output", "tokens out · 输出词元")):
        per_second = report[f"{name}_tokens_per_second"]
        table.add_row(label, f"{report[f'{name}_tokens']:,}  ({per_second:,.1f}/s)")
    table.add_row("all tokens · 词元合计", f"{report['total_tokens_per_second']:,.1f}/s")
    if "steps" in report:
        table.add_row("loading · 加载", f"{report['load_seconds']:.2f} s")
        table.add_row("steps · 步数", f"{report['steps']:,}")
        table.add_row("KV blocks, at most · KV 块，最多", f"{report['peak_used_blocks']} / {report['num_blocks']}")
        table.add_row("preemptions · 抢占", str(report["preemptions"]))
    console.print(table, highlight=False)

    table = Table("", "mean", *(f"p{p}" for p in PERCENTILES), title="Time · 时间", title_justify="left")
    for name, label in (
        ("ttft_seconds", "TTFT · 首词元时间"),
        ("tpot_seconds", "TPOT · 每个词元"),
        ("itl_seconds", "ITL · 词元间隔"),
        ("e2e_seconds", "E2E · 整个请求"),
    ):
        if report.get(name) is not None:
            table.add_row(label, *(f"{value * 1e3:,.1f} ms" for value in report[name].values()))
    console.print(table)
