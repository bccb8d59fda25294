"""``mini-infer kernels``: operations and backends, what runs where, and why."""

import os
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from mini_infer import kernels
from mini_infer.exceptions import KernelError
from mini_infer.kernels import registry
from mini_infer.kernels.registry import ENVIRONMENT_VARIABLE, OPS

CHOSEN, AVAILABLE, ABSENT = "[bold green]chosen[/]", "available", "[bright_black]-[/]"
LAYERS = {
    "0.6B": ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)),
    "8B": ((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096)),
}
"""Inputs and outputs of the products of a layer: of queries, keys and values; of attention; gate and up; down."""

OURS = ("reference", "triton", "cpu")


def show_kernels(console: Console, backend: str | None = None) -> None:
    """One table for each device of this machine, and the reasons below.

    Raises:
        KernelError: there is no such backend.
    """
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    resolved = {device: kernels.resolve(device, backend) for device in devices}
    backends = list(dict.fromkeys((*OURS, *kernels.available_backends())))
    for device in devices:
        table = Table(title=f"Kernels on {device} · {device} 上的算子", title_justify="left")
        table.add_column("operation · 算子", no_wrap=True)
        for name in backends:
            table.add_column(name)
        for op in OPS:
            able, chosen = kernels.available_backends(op, device), resolved[device].backend_of(op).split("+")
            marks = [CHOSEN if name in chosen else AVAILABLE if name in able else ABSENT for name in backends]
            table.add_row(op, *marks)
        console.print(table)
    console.print("chosen 选用   available 可用   - not for this device 不适用于此设备")

    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    reason = "the highest priority for the device · 该设备上优先级最高者"
    if backend or wanted:
        reason = f"--kernel-backend {backend}" if backend else f"{ENVIRONMENT_VARIABLE}={wanted}"
    console.print(f"\n[bold]Why · 原因[/bold]\n  chosen 选用: {reason}", highlight=False)
    for name in backends:
        where = [device for device in devices if any(name in kernels.available_backends(op, device) for op in OPS)]
        if not where:
            console.print(f"  {name}: {_why_not(name)}", highlight=False, markup=False)


def measure_products(console: Console, layers: Mapping[str, Sequence[tuple[int, int]]] = LAYERS) -> None:
    """Time every way to multiply with the weights of such layers on this processor, keep the times and show them.

    What was measured before is forgotten, so other weights are measured anew when they are next loaded.

    Raises:
        KernelError: the CPU's kernels are not there.
    """
    if "cpu" not in kernels.available_backends():
        raise KernelError(f"the CPU's kernels are not there: {_why_not('cpu')}; pip install 'mini-infer[cpu]'")
    from mini_infer.kernels.cpu import choice, linear
    from mini_infer.kernels.cpu.cache import choices_file

    choice.forget()
    for model, shapes in layers.items():
        for inputs, outputs in shapes:
            weight = torch.randn(outputs, inputs).bfloat16()
            names = linear.candidates(weight)
            found = linear.timed(weight, None, names, again=True)
            chosen = linear.chosen(found)
            table = Table(title=f"{model}: {inputs} → {outputs}, bfloat16", title_justify="left")
            table.add_column("tokens · 词元数", justify="right")
            for name in names:
                table.add_column(f"{name}, µs", justify="right")
            for size, name_chosen in chosen.items():
                cells = [f"{found[name][size] * 1e6:,.0f}" for name in names]
                marked = [f"[bold green]{c}[/]" if n == name_chosen else c for n, c in zip(names, cells, strict=True)]
                table.add_row(str(size), *marked)
            console.print(table)
    kept = choices_file()
    console.print(f"green is taken · 绿色为选用；{torch.get_num_threads()} threads · 线程\n{kept}", soft_wrap=True)


def _why_not(backend: str) -> str:
    """Why a backend does nothing on this machine."""
    if backend in kernels.available_backends():
        hint = (
            "; TRITON_INTERPRET=1 runs it on the CPU, slowly · 可在 CPU 上慢速解释执行" if backend == "triton" else ""
        )
        return f"no such device here (no GPU) · 本机没有它所需的设备（无 GPU）{hint}"
    reason = registry.broken_backends().get(backend)
    if reason is None:
        return "not registered · 未注册"
    return f"{'not installed · 未安装' if 'ModuleNotFoundError' in reason else 'broken · 加载失败'}: {reason}"
