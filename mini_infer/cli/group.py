"""How the program ends: whatever goes wrong is one line on stderr and an exit status."""

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from mini_infer.exceptions import InvalidConfigError, InvalidRequestError, KernelError, MiniInferError

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130


class _InOneLine:
    """A program with ``--debug`` anywhere on its line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console without Chinese shows ?
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        debug = "--debug" in words[:end]
        words = [word for word in words[:end] if word != "--debug"] + words[end:]
        try:
            status = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)  # type: ignore[misc]
        except Exception as error:
            if debug:
                traceback.print_exc()
            status = fail(error)
        if not standalone_mode:
            return status
        sys.exit(status or 0)


class Group(_InOneLine, TyperGroup):
    """Several commands."""


class Command(_InOneLine, TyperCommand):
    """A program of one command."""


def fail(error: Exception) -> int:
    """Print what went wrong, in one line; the exit status that goes with it."""
    message, status = str(error), FAILED
    if hasattr(error, "format_message"):  # typer's own, about the line that was typed
        context = getattr(error, "ctx", None)
        message, status = error.format_message(), UNUSABLE
        if message and context is not None:
            message = f"{message.rstrip('.')} (see {context.command_path} --help)"
    elif isinstance(error, InvalidConfigError | InvalidRequestError | KernelError):
        status = UNUSABLE
    elif isinstance(error, typer.Abort):
        message, status = "interrupted", INTERRUPTED
    elif isinstance(error, OSError) and error.filename is not None and not isinstance(error, MiniInferError):
        message = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, MiniInferError | ImportError):
        message = f"{type(error).__name__}: {error}; --debug shows where"
    if message:
        message = " ".join(message.split("\n"))
        label = getattr(error, "label", "error: ")  # of an error that speaks the reader's language
        Console(stderr=True).print(Text.assemble((label, "red"), message), soft_wrap=True)
    return status
