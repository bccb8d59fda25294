"""Products with a weight beside oneDNN's and beside what the machine can do: ``python -m benchmarks.products``.

The products of a layer of a 0.6B and of an 8B model in bfloat16, for one token up to a thousand: the way that
Mini-Infer has chosen on this processor, and oneDNN with its weight prepacked, in turns. Several weights of each take
turns, too, since a step finds none of its own in the cache. The machine's limits are measured before and after every
row, as in `benchmarks.compare`; a product can be no faster than reading its weight, nor than its arithmetic.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.report import processor, save
from benchmarks.roofline import Machine
from mini_infer import kernels
from mini_infer.cli.kernels import LAYERS
from mini_infer.kernels.cpu import onednn

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)

AT_ONCE = 256 << 20
"""Bytes of weights that take turns, more than any cache holds."""

SECONDS = 2.0
"""Of a row, after which it gets no further round if it had five."""

Product = Callable[[Tensor], Tensor]

console = Console()


def seconds_in_turns(ways: Mapping[str, Sequence[Product]], x: Tensor) -> dict[str, list[float]]:
    """Seconds of each way in every round; each round takes the next of its weights."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for some in ways.values():
        some[0](x)
    begin, turn = time.perf_counter(), 1
    while turn <= 5 or (time.perf_counter() - begin < SECONDS and turn <= 200):
        for name, some in ways.items():
            start = time.perf_counter()
            some[turn % len(some)](x)
            found[name].append(time.perf_counter() - start)
        turn += 1
    return found


def measure(num_inputs: int, num_outputs: int, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens.

    ``of_onednn`` and ``of_the_machine`` are how fast ours is beside each, medians of the rounds' own ratios; 1 is as
    fast.
    """
    weight_bytes = 2 * num_inputs * num_outputs
    weights = [torch.randn(num_outputs, num_inputs).bfloat16() for _ in range(max(1, AT_ONCE // weight_bytes))]
    ways: dict[str, list[Product]] = {"mini-infer": [kernels.pack_linear(weight) for weight in weights]}
    if onednn.is_there():
        ways["onednn"] = [onednn.pack(weight, None)[0] for weight in weights]
    for num_tokens in tokens:
        x = torch.randn(num_tokens, num_inputs).bfloat16()
        before = Machine.measure(torch.device("cpu"), torch.bfloat16)
        with torch.inference_mode():
            seconds = seconds_in_turns(ways, x)
        machine = before.best(Machine.measure(torch.device("cpu"), torch.bfloat16))
        least = max(
            (weight_bytes + x.nbytes + 2 * num_tokens * num_outputs) / machine.bytes_per_second,
            2 * num_tokens * num_inputs * num_outputs / machine.flops_per_second,
        )
        ours = seconds["mini-infer"]
        row = {
            "inputs": num_inputs,
            "outputs": num_outputs,
            "tokens": num_tokens,
            "read_gb_per_second": round(machine.bytes_per_second / 1e9, 1),
            "matrix_tflops": round(machine.flops_per_second / 1e12, 3),
            "floor_microseconds": round(1e6 * least, 1),
            "microseconds": {name: round(1e6 * statistics.median(times), 1) for name, times in seconds.items()},
            "of_the_machine": round(statistics.median(least / own for own in ours), 3),
        }
        if "onednn" in seconds:
            row["of_onednn"] = round(
                statistics.median(other / own for own, other in zip(ours, seconds["onednn"], strict=True)), 3
            )
        yield row


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(LAYERS)}; all by default.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help=f"{', '.join(map(str, TOKENS))} by default.")] = None,
    keep: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/products-cpu-PROCESSOR.json.")] = False,
) -> None:
    """Measure on this machine."""
    if unknown := [name for name in model or [] if name not in LAYERS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(LAYERS)}")
    rows = []
    for name in model or LAYERS:
        for num_inputs, num_outputs in LAYERS[name]:
            for row in measure(num_inputs, num_outputs, tokens or TOKENS):
                rows.append({"model": name, **row})
                console.print(rows[-1], soft_wrap=True)
    if keep:
        figures = {"dtype": "bfloat16", "threads": torch.get_num_threads(), "products": rows}
        command = "python -m benchmarks.products --save"
        console.print(f"written to {save(f'products-cpu-{processor()}', command, figures)}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
