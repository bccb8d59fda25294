"""Runs the code blocks of a page: Python in a process of the page's own, bash in the same folder, and what they print.

A page's process begins with everything imported (it is forked from one that only imports), in a temporary folder that
shows the top level of the repository, and with Triton interpreted. So a page neither sees nor leaves anything behind.
"""

import contextlib
import doctest
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.example import SybilFailure
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parent.parent
LIMIT = 300  # seconds for one block; a page should take ten
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "PYTHONUTF8": "1",
    "TQDM_DISABLE": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
}
PRELOADED = [
    "torch",
    "transformers",
    "mini_infer.engine.llm_engine",
    "mini_infer.kernels.triton",
    "mini_infer.kernels.cpu",
    "tutorials.pages",
]


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """This process's environment as a page has it, for the processes that are started meanwhile."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("PYTEST_")]:  # a page may run pytest itself
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def processes() -> multiprocessing.context.BaseContext:
    """Starts processes that have torch and the rest imported already, where the system can (else they import it)."""
    able = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if able else "spawn")
    if able:
        context.set_forkserver_preload(PRELOADED)
        with environment():
            multiprocessing.forkserver.ensure_running()
    return context


def interpret(folder: str, blocks: Connection) -> None:
    """The page's process: run each block that arrives, in one namespace; answer with what it printed and its error."""
    import torch

    os.environ.update(ENVIRONMENT)
    os.chdir(folder)
    sys.path[:0] = [folder, str(ROOT)]
    torch.set_num_threads(1)
    namespace = {"__name__": "__main__"}
    while True:
        try:
            source, path = blocks.recv()
        except EOFError:
            return
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        error = ""
        with contextlib.redirect_stdout(out):
            try:
                exec(compile(source, path, "exec", dont_inherit=True), namespace)
            except BaseException as raised:
                beyond_us = raised.__traceback__.tb_next
                error = "".join(traceback.format_exception(type(raised), raised, beyond_us))
        blocks.send((out.buffer.getvalue().decode("utf-8", "replace"), error))


class Page:
    """A page that is being run."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True)
        for entry in ROOT.iterdir():
            if not entry.name.startswith(".") and entry.name != "learn":
                Path(self.folder.name, entry.name).symlink_to(entry)
        self.interpreter: multiprocessing.process.BaseProcess | None = None
        self.printed: str | None = None  # by the block just run, if nobody has looked yet
        self.end = 0  # of that block, in the page's text
        self.failed = False

    def python(self, source: str, path: str) -> tuple[str, str]:
        if self.interpreter is None:
            context = processes()
            self.blocks, theirs = context.Pipe()
            self.interpreter = context.Process(target=interpret, args=(self.folder.name, theirs))
            with environment():
                self.interpreter.start()
            theirs.close()
        self.blocks.send((source, path))
        if not self.blocks.poll(LIMIT):
            return "", f"the block is still running after {LIMIT} s"
        try:
            return self.blocks.recv()
        except EOFError:
            self.interpreter.join()
            return "", f"the page's process ended, with status {self.interpreter.exitcode}"

    def bash(self, source: str) -> tuple[str, str]:
        try:
            with environment():
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", source],
                    cwd=self.folder.name,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    encoding="utf-8",
                    errors="replace",
                    timeout=LIMIT,
                )
        except subprocess.TimeoutExpired:
            return "", f"the block is still running after {LIMIT} s"
        return done.stdout, f"exit status {done.returncode}\n{done.stderr}" if done.returncode else ""

    def close(self) -> None:
        if self.interpreter is not None:
            self.blocks.close()
            self.interpreter.join(5)
            self.interpreter.kill()
        self.folder.cleanup()


def begin(example: Example) -> Page:
    """The page of an example, which counts as failed from now until somebody says otherwise."""
    if "page" not in example.namespace:
        example.namespace["page"] = Page()
    page: Page = example.namespace["page"]
    if page.failed:
        pytest.skip("an earlier block of this page failed")
    page.failed = True
    return page


def run(example: Example) -> None:
    page = begin(example)
    if example.region.lexemes["arguments"] == "python":
        # Lines are counted from the top of the page, so that a traceback points into it.
        source = "\n" * (example.line + example.parsed.line_offset) + example.parsed
        printed, error = page.python(source, str(example.path))
    else:
        printed, error = page.bash(example.parsed)
    if error:
        raise SybilFailure(example, f"{error}\nprinted before that:\n{printed}" if printed else error)
    page.printed, page.end, page.failed = printed, example.end, False


def compare(example: Example) -> None:
    page = begin(example)
    if page.printed is None or example.document.text[page.end : example.start].strip():
        raise SybilFailure(example, "an output block must directly follow the block that prints it")
    checker, wanted = doctest.OutputChecker(), str(example.parsed)
    if not checker.check_output(wanted, page.printed, FLAGS):
        raise SybilFailure(example, f"the page says:\n{wanted}\nthe block printed:\n{page.printed}")
    page.printed, page.failed = None, False


def unknown(example: Example) -> None:
    raise SybilFailure(example, "a page has blocks of python, bash, output and text, and no others")


def close(namespace: dict[str, Any]) -> None:
    if "page" in namespace:
        namespace["page"].close()


class Blocks(CodeBlockParser):
    """Every fenced block of a page, with what to do about it."""

    language = "python"

    def __call__(self, document: Document) -> Iterable[Region]:
        actions = {"python": run, "bash": run, "output": compare}
        for region in self.lexers(document):
            language = region.lexemes["arguments"]
            if language != "text":
                region.parsed, region.evaluator = region.lexemes["source"], actions.get(language, unknown)
                yield region


SYBIL = Sybil([Blocks()], patterns=["[01]?_*/en.md", "[01]?_*/zh.md"], teardown=close)
