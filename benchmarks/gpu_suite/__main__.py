"""Runs the sections one after the other, prints tables and writes the results file."""

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_suite import diffusion, engine, kernels, parity
from benchmarks.gpu_suite.figure import FULL, TINY, Context, Figure
from benchmarks.gpu_suite.isolation import Section, run
from benchmarks.report import RESULTS, hardware, save
from benchmarks.shapes import make_random_checkpoint

SECTIONS: dict[str, tuple[Section, int]] = {  # and the most seconds each may take
    "parity": (parity.parity, 110),
    "kernels": (kernels.row_kernels, 70),
    "attention": (kernels.attention, 60),
    "products": (kernels.products, 40),
    "steps": (engine.steps, 60),
    "workload": (engine.workload, 170),
    "equality": (engine.equality, 40),
    "profile": (engine.where_time_goes, 60),
    "diffusion": (diffusion.canvases, 90),
}
ENGINE = ("steps", "workload", "equality", "profile", "diffusion")


def main(
    only: Annotated[
        str, typer.Option(help=f"Sections, with commas between: {', '.join(SECTIONS)}; engine is {', '.join(ENGINE)}.")
    ] = "",
    tiny: Annotated[bool, typer.Option(help="Rehearse at toy sizes, on a CPU too; such figures mean nothing.")] = False,
    minutes: Annotated[float, typer.Option(help="Stop after so long; what was measured by then counts.")] = 8,
    output: Annotated[Path, typer.Option(help="Directory of the results file.")] = RESULTS,
) -> None:
    chosen = choose(only)
    if not (tiny or torch.cuda.is_available()):
        raise typer.BadParameter("there is no GPU here; --tiny rehearses on the CPU")
    console, end = Console(), time.monotonic() + 60 * minutes
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        context = Context(TINY if tiny else FULL, Path(directory))
        if set(chosen) & {"steps", "workload", "profile", "diffusion"}:
            make_random_checkpoint(context.checkpoint, context.sizes.shape)
        for name in chosen:
            section, limit = SECTIONS[name]
            start = time.monotonic()
            left = end - start
            figures, error = run(section, context, left if tiny else min(limit, left))
            report[name] = {"seconds": round(time.monotonic() - start, 1), "error": error}
            report[name]["figures"] = [figure.to_dict() for figure in figures]
            console.print(table(f"{name}, {report[name]['seconds']} s", figures))
            if error:
                console.print(f"[red]{name} did not end well:[/red] {error}", highlight=False)
    device = re.sub(r"\W+", "-", hardware()["gpu"] or "cpu").strip("-").lower()
    name = f"gpu-{device}" + ("-tiny" if tiny else "")
    command = " ".join(["python -m benchmarks.gpu_suite", *sys.argv[1:]])
    console.print(f"written to {save(name, command, report, output)}", soft_wrap=True)
    wrong = any(figure["verdict"] == "miss" for figure in report.get("parity", {}).get("figures", []))
    raise typer.Exit(1 if wrong or any(section["error"] for section in report.values()) else 0)


def choose(only: str) -> list[str]:
    """The sections that `only` names, in their order; all of them if it is empty."""
    wanted = {name for part in only.split(",") if part for name in (ENGINE if part == "engine" else (part,))}
    if unknown := wanted - SECTIONS.keys():
        raise typer.BadParameter(f"no section {sorted(unknown)}; there are {', '.join(SECTIONS)} and engine")
    return [name for name in SECTIONS if not wanted or name in wanted]


def table(title: str, figures: list[Figure]) -> Table:
    rows = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("figure", "value", "bar", ""):
        rows.add_column(name, justify="right" if name in ("value", "bar") else "left", overflow="fold")
    rows.add_column("from", overflow="fold", style="dim")
    colours = {"pass": "green", "miss": "red", "untaken": "yellow"}
    for figure in figures:
        sign = "≤" if figure.at_most else "≥"
        verdict = figure.verdict
        rows.add_row(
            figure.what,
            "–" if figure.value is None else f"{figure.value:,g} {figure.unit}",
            "" if figure.bar is None else f"{sign} {figure.bar:,g}",
            f"[{colours[verdict]}]{verdict}" if verdict else "",
            "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in figure.details.items()),
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
