"""The command line."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

import mini_infer
from mini_infer.exceptions import MiniInferError

app = typer.Typer(no_args_is_help=True, help="Mini-Infer: an LLM inference engine to read, to learn from, and to use.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mini-infer {mini_infer.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console without Chinese shows ? instead


@app.command()
def demo() -> None:
    """Ask the bundled model in English and in Chinese, then run a batch and show what the engine did."""
    from mini_infer.cli.demo import run_demo  # torch and transformers load only when there is work to do

    try:
        run_demo(Console())
    except MiniInferError as error:
        _fail(error)


@app.command()
def trace(
    path: Annotated[Path, typer.Argument(help="What EngineConfig(trace=...) wrote.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="Most sequences in the timeline.")] = 40,
) -> None:
    """Draw a trace: totals, who ran when, and who held which KV block. Perfetto opens the same file."""
    from mini_infer.cli.trace import show_trace

    try:
        show_trace(path, Console(), rows)
    except MiniInferError as error:
        _fail(error)


@app.command()
def kernels() -> None:
    """Show which backend runs each operation on this machine, and why the others do not."""
    from mini_infer.cli.kernels import show_kernels

    try:
        show_kernels(Console())
    except MiniInferError as error:
        _fail(error)


def _fail(error: MiniInferError) -> NoReturn:
    Console(stderr=True).print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
    raise typer.Exit(1) from error
