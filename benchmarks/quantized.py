"""Products with quantised weights beside the same in bfloat16, on a CPU: ``python -m benchmarks.quantized``.

The layer is a feed-forward one of Qwen3-0.6B, 1024 to 6144. All formats take turns in one process, on one thread, and
what is measured is that thread's processor time, so that others on the machine disturb as little as they can. Several
weights of each take turns, too, since a step finds none of its own in the cache.
"""

import statistics
import time

import torch
import typer
from rich.console import Console

from benchmarks.report import save
from mini_infer import kernels
from mini_infer.kernels import PackedLinear, QuantizedMatrix

INPUTS, OUTPUTS = 1024, 6144
TOKENS = {1: 600, 4: 200, 16: 60, 64: 20, 384: 7, 1500: 5}
"""And rounds of each."""

FORMATS = ("bfloat16", "int8", "int8 in groups of 32", "int4 in groups of 32", "table in groups of 32")


def weight(name: str) -> PackedLinear:
    """A random one in a format."""
    if name == "bfloat16":
        return kernels.pack_linear(torch.randn(OUTPUTS, INPUTS).bfloat16())
    group = INPUTS if name == "int8" else 32
    scales = (torch.rand(OUTPUTS, INPUTS // group) / 100).half()
    table = None
    if name.startswith("int8"):
        codes = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    else:
        codes = torch.randint(0, 256, (OUTPUTS, INPUTS // 2), dtype=torch.uint8)
        table = torch.arange(-8.0, 8.0) if name.startswith("int4") else torch.randint(-127, 128, (16,)).float()
    return kernels.pack_quantized(QuantizedMatrix(codes, scales, group, None, table), None, torch.bfloat16)


def main() -> None:
    """Measure on this machine and write benchmarks/results/quantized-cpu.json."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = {name: [weight(name) for _ in range(4 if name == "bfloat16" else 8)] for name in FORMATS}
    rows = []
    for tokens, rounds in TOKENS.items():
        x = torch.randn(tokens, INPUTS).bfloat16()
        seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
        with torch.inference_mode():
            for turn in range(rounds + 2):
                for name, some in weights.items():
                    start = time.thread_time()
                    some[turn % len(some)](x)
                    seconds[name].append(time.thread_time() - start)
        base = statistics.median(seconds["bfloat16"][2:])
        for name, times in seconds.items():
            median = statistics.median(times[2:])
            speedup = statistics.median(a / b for a, b in zip(seconds["bfloat16"][2:], times[2:], strict=True))
            rows.append(
                {
                    "format": name,
                    "tokens": tokens,
                    "microseconds": round(1e6 * median, 1),
                    "speedup": round(speedup, 2),
                    "gflops": round(2e-9 * tokens * INPUTS * OUTPUTS / median, 1),
                }
            )
        Console().print(tokens, round(1e6 * base), [row for row in rows if row["tokens"] == tokens])
    figures = {"inputs": INPUTS, "outputs": OUTPUTS, "threads": 1, "clock": "processor time", "products": rows}
    Console().print(f"written to {save('quantized-cpu', 'python -m benchmarks.quantized', figures)}")


if __name__ == "__main__":
    typer.run(main)
