"""Servers as users start them: ``mini-infer serve`` in a process of its own, of this tree or of another one."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parents[1]

PATIENCE = 120.0
"""Seconds until a server must be ready."""


class RunningServer(NamedTuple):
    """A server on 127.0.0.1."""

    port: int
    pid: int


@contextmanager
def running_server(
    *options: str, tree: Path = HERE, num_threads: int = 1, open_files: int | None = None
) -> Iterator[RunningServer]:
    """A server, until the block is left.

    Args:
        options: of ``mini-infer serve``.
        tree: whose code it runs.
        num_threads: of the model.
        open_files: how many files it may open, and cannot raise; None leaves that as it is.

    Raises:
        RuntimeError: it does not get ready.
    """

    def limit() -> None:
        if open_files is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mini_infer", "serve", "--port", str(port), "--drain-timeout", "0", *options],
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(num_threads)},
        cwd=tree,
        stderr=subprocess.DEVNULL,
        preexec_fn=limit,
    )
    try:
        _wait_until_ready(process, port)
        yield RunningServer(port, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start (exit status {process.poll()})")
