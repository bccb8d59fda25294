"""The kernels' speed as a table, a results file and a plot."""

import re
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import DEVICE, copy_bandwidth, matrix_peak
from benchmarks.report import RESULTS, hardware, save

__all__ = ["RESULTS", "report", "show", "table_of_others", "write"]

Row = dict[str, Any]


def report(timed: list[Row]) -> dict[str, Any]:
    """`timed` has op, shape, dtype, backend, seconds, bytes, flops and compute of each; the peaks are measured here."""
    bandwidth = copy_bandwidth()
    peaks = {name: matrix_peak(getattr(torch, name)) for name in sorted({row["dtype"] for row in timed})}
    reference = {_key(row): row["seconds"] for row in timed if row["backend"] == "reference"}
    rows = []
    for row in timed:
        rate = row["flops" if row["compute"] else "bytes"] / row["seconds"]
        peak = peaks[row["dtype"]] if row["compute"] else bandwidth
        rows.append(
            {name: row[name] for name in ("op", "shape", "dtype", "backend")}
            | {
                "microseconds": round(row["seconds"] * 1e6, 2),
                "speedup_over_reference": round(reference[_key(row)] / row["seconds"], 2),
                "rate": float(f"{rate / (1e12 if row['compute'] else 1e9):.4g}"),
                "unit": "TFLOP/s" if row["compute"] else "GB/s",
                "percent_of_peak": round(100 * rate / peak, 1),
            }
        )
    return {
        "copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "matrix_tflops": {name: round(peak / 1e12, 3) for name, peak in peaks.items()},
        "kernels": rows,
    }


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["dtype"]


def show(report: dict[str, Any], console: Console) -> None:
    machine = hardware()
    peaks = ", ".join(f"{name} {tflops} TFLOP/s" for name, tflops in report["matrix_tflops"].items())
    console.print(
        f"\n{machine['gpu'] or machine['cpu']}, torch {machine['torch']}. Measured in this run: "
        f"copying {report['copy_bandwidth_gb_per_s']} GB/s, matrix products {peaks}."
    )
    table = Table(title="Kernels, median of all rounds", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("operation and shape", "dtype", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "speedup", "rate", "of peak"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in sorted(report["kernels"], key=_key):
        if previous != row["op"]:
            previous = row["op"]
            table.add_row(f"[bold]{previous}")
        table.add_row(
            f"  {row['shape']}",
            row["dtype"],
            row["backend"],
            f"{row['microseconds']:,.1f} µs",
            f"{row['speedup_over_reference']:.2f}x",
            f"{row['rate']:g} {row['unit']}",
            f"{row['percent_of_peak']:.1f} %",
        )
    console.print(table)
    console.print(
        "Speedup is over the reference. Peak is the copy for GB/s and the matrix product for TFLOP/s; tensors that "
        "stay in a CPU's cache can exceed the copy."
    )
    if DEVICE == "cpu":
        console.print(
            "No GPU here: only backends that run on the CPU were timed. Triton runs interpreted on a CPU, which says "
            "nothing about its speed, so it was not timed."
        )


def table_of_others(seconds: dict[str, float]) -> Table:
    table = Table("benchmark", "median", title="The engine", title_justify="left")
    for name, median in seconds.items():
        table.add_row(name, f"{median * 1e3:.2f} ms")
    return table


def write(report: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """``kernels-DEVICE.json`` and a plot of the same name; returns their paths."""
    machine = hardware()
    device = re.sub(r"\W+", "-", machine["gpu"] or "cpu").strip("-").lower()
    path = save(f"kernels-{device}", "pytest --benchmark", report, directory)
    return path, _plot(report, path.with_suffix(".png"), machine["gpu"] or machine["cpu"])


def _plot(report: dict[str, Any], path: Path, machine: str) -> Path:
    """One panel per operation, one bar per shape, dtype and backend: percent of what the machine can do."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    ops = list(dict.fromkeys(row["op"] for row in report["kernels"]))
    backends = list(dict.fromkeys(row["backend"] for row in report["kernels"]))
    colours = dict(zip(backends, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    counts = [sum(row["op"] == op for row in report["kernels"]) for op in ops]
    figure, panels = pyplot.subplots(
        len(ops),
        figsize=(10, 0.9 * len(ops) + 0.25 * sum(counts)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
        sharex=True,
    )
    for op, panel in zip(ops, panels[:, 0], strict=True):
        rows = [row for row in report["kernels"] if row["op"] == op]
        bars = panel.barh(
            [f"{row['shape']}, {row['dtype']}, {row['backend']}" for row in rows],
            [row["percent_of_peak"] for row in rows],
            color=[colours[row["backend"]] for row in rows],
        )
        panel.bar_label(bars, [f" {row['rate']:g} {row['unit']}" for row in rows], fontsize=7)
        panel.set_title(op, loc="left", fontsize=10)
        panel.tick_params(labelsize=7)
        panel.invert_yaxis()
        panel.set_xlim(0, 115)
    panels[-1, 0].set_xlabel("percent of the measured copy bandwidth (GB/s) or matrix peak (TFLOP/s)")
    figure.suptitle(machine, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
