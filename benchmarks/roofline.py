"""The roofline: the least time that a workload can take on a machine (Williams, Waterman and Patterson, 2009).

``python -m benchmarks.roofline [MODEL]`` does what ``mini-infer bench`` does, and says how near it came to that.

A step must read every weight once, read the keys and values of the sequences that decode, and write those of the tokens
that are new; and it must do the arithmetic of its matrix products and of attention. It cannot be faster than the bytes
over the memory's bandwidth, nor than the operations over the peak of matrix products; the larger of the two is the
step's floor. A workload's floor is the sum over the fewest steps there can be: every request begins as soon as there is
a seat, its whole prompt in one step, and generates a token in each step.

Norms, rotations, biases, embeddings, sampling and everything that Python does count as nothing. For one step of T new
tokens, R of which are followed by a sampled one, with P parameters in the layers' matrices::

    bytes = itemsize * (P + vocab * hidden)                                  weights
          + itemsize * 2 * kv_heads * head_dim * layers * (context + T)      keys and values: read, written
    FLOPs = 2 * P * T + 2 * vocab * hidden * R                               linear
          + 4 * heads * head_dim * layers * pairs                            attention: scores, and their use

`context` is the sum of what the decoding sequences have; `pairs` counts each query with each key that it sees.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from mini_infer import EngineConfig, LLMEngine, SamplingParams, kernels
from mini_infer.cli.bench import Workload, measure, parse_range, show
from mini_infer.cli.flags import engine_flags
from mini_infer.cli.group import Command
from mini_infer.executor.device import resolve_dtype
from mini_infer.models import ModelConfig

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Machine:
    """What a device can do at best, measured.

    Attributes:
        bytes_per_second: reading memory.
        flops_per_second: multiplying matrices.
    """

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        """Takes about a second."""
        return cls(read_bandwidth(device), matrix_peak(device, dtype))

    def best(self, other: "Machine") -> "Machine":
        """What was seen at least once."""
        return Machine(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )


@dataclass(frozen=True)
class Work:
    """What cannot be avoided.

    Attributes:
        weight_bytes, kv_bytes: moved between memory and processor.
        linear_flops, attention_flops: multiplications and additions.
    """

    weight_bytes: int = 0
    kv_bytes: int = 0
    linear_flops: int = 0
    attention_flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.linear_flops + other.linear_flops,
            self.attention_flops + other.attention_flops,
        )


@dataclass(frozen=True)
class Floor:
    """The least time that a workload takes.

    Attributes:
        steps: the fewest there can be.
        work: of all of them.
        memory_seconds: in the steps that the memory's bandwidth holds back.
        compute_seconds: in those that arithmetic does.
    """

    steps: int
    work: Work
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        return self.memory_seconds + self.compute_seconds

    @property
    def limit(self) -> Literal["memory", "compute"]:
        """What binds for most of the time."""
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"


def floor(model: ModelConfig, itemsize: int, workload: Workload, machine: Machine, max_num_seqs: int) -> Floor:
    """The least time for a workload whose requests are all there at the beginning.

    Args:
        model: the decoder's shape.
        itemsize: bytes of a weight, and of a number in the KV cache.
        workload: the requests.
        machine: its limits.
        max_num_seqs: seats; a request that has none waits.
    """
    steps, total, seconds = 0, Work(), {"memory": 0.0, "compute": 0.0}
    for prompts, contexts in _fewest_steps(workload, max_num_seqs):
        work = step_work(model, itemsize, prompts, contexts)
        memory = (work.weight_bytes + work.kv_bytes) / machine.bytes_per_second
        compute = (work.linear_flops + work.attention_flops) / machine.flops_per_second
        seconds["memory" if memory >= compute else "compute"] += max(memory, compute)
        steps, total = steps + 1, total + work
    return Floor(steps, total, seconds["memory"], seconds["compute"])


def step_work(model: ModelConfig, itemsize: int, prompts: list[int], contexts: list[int]) -> Work:
    """The work of one step.

    Args:
        prompts: lengths of the prompts that are computed whole.
        contexts: tokens that each decoding sequence attends to, its new one included.
    """
    new, sampled = sum(prompts) + len(contexts), len(prompts) + len(contexts)
    layers = kv_bytes = attention_flops = 0
    for layer, count in Counter(model.layers).items():
        attention, window = layer.attention, layer.attention.sliding_window
        query, key_value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        layers += count * model.hidden_size * (2 * (query + key_value) + 3 * layer.feed_forward.intermediate_size)
        seen = sum(min(context, window or context) for context in contexts)
        read = seen - len(contexts)  # the new token's own are written, not read
        kv_bytes += count * itemsize * 2 * key_value * (read + new)
        pairs = seen + sum(_causal_pairs(length, window or length) for length in prompts)
        attention_flops += count * 4 * query * pairs
    output = model.vocab_size * model.hidden_size
    return Work(
        weight_bytes=itemsize * (layers + output),
        kv_bytes=kv_bytes,
        linear_flops=2 * layers * new + 2 * output * sampled,
        attention_flops=attention_flops,
    )


def _causal_pairs(length: int, window: int) -> int:
    """Pairs of a query and a key in a prompt, where each token sees the ``window`` latest, itself included."""
    window = min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def _fewest_steps(workload: Workload, max_num_seqs: int) -> Iterator[tuple[list[int], list[int]]]:
    """The arguments of `step_work` for each step."""
    waiting = deque(zip(map(len, workload.prompts), workload.num_outputs, strict=True))
    running: list[tuple[int, int]] = []  # context in the next step, tokens to come
    while waiting or running:
        begun = [waiting.popleft() for _ in range(min(len(waiting), max_num_seqs - len(running)))]
        yield [length for length, _ in begun], [context for context, _ in running]
        running = [(context + 1, left - 1) for context, left in running + begun if left > 1]


# ---- what the machine can do ---------------------------------------------------------------------------------------


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a tensor that fits no cache, at best."""
    numbers = torch.ones((1 << 31 if device.type == "cuda" else 1 << 29) // 4, device=device)
    return numbers.nbytes / _least_seconds(numbers.sum, device)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, at best; on a CPU that PyTorch multiplies float32
    faster on, of that, since numbers can be widened."""
    return _matrix_rate(device, multiplied_as(device, dtype), 8192 if device.type == "cuda" else 1024)


def multiplied_as(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 where PyTorch multiplies that faster: without instructions for bfloat16 it takes a
    hundred times as long as for float32."""
    if device.type == "cuda" or dtype.itemsize >= torch.float32.itemsize:
        return dtype
    return max((dtype, torch.float32), key=lambda kind: _matrix_rate(device, kind, 256))


def _matrix_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    return 2 * n**3 / _least_seconds(lambda: a @ b, device)


def _least_seconds(function: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


# ---- the command line ----------------------------------------------------------------------------------------------


@app.command(cls=Command)
@engine_flags(model_argument=True)
def main(
    config: EngineConfig,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 16,
    input_len: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens of each prompt.")] = "32:256",
    output_len: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens to generate for each.")] = "16:128",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure throughput and latency here, and say how close that is to this machine's limits."""
    ranges = parse_range("input_len", input_len), parse_range("output_len", output_len)
    report = measure_with_limits(config, Workload.draw(requests, *ranges, config.seed))
    if json_:
        print(json.dumps(report, indent=2))
    else:
        console = Console()
        show(report, console)
        show_roofline(report["roofline"], console)


def measure_with_limits(config: EngineConfig, workload: Workload) -> dict[str, Any]:
    """What ``mini-infer bench`` reports of a workload, greedily; and under ``"roofline"`` what could be.

    The machine is measured before and after: one that others use wanders.
    """
    begin = time.perf_counter()
    engine = LLMEngine(config)
    load_seconds = time.perf_counter() - begin
    chosen = kernels.resolve(engine.device, config.kernel_backend)
    dtype = resolve_dtype(config.dtype, engine.model_config.dtype, chosen)
    machine = Machine.measure(engine.device, dtype)
    report = measure(engine, workload, SamplingParams(temperature=0))
    machine = machine.best(Machine.measure(engine.device, dtype))
    least = floor(engine.model_config, dtype.itemsize, workload, machine, config.max_num_seqs)
    return {"load_seconds": load_seconds, **report, "roofline": _roofline(machine, least, workload, report["seconds"])}


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


def show_roofline(roofline: Mapping[str, Any], console: Console) -> None:
    """Print what could be, and how near the run came to it."""
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


if __name__ == "__main__":
    app()
