"""A real server on a free port, in a thread of the test process."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from mini_infer import AsyncLLMEngine
from mini_infer.engine.stats import EngineStats
from mini_infer.serving import create_app
from mini_infer.serving.server import Server
from tests.engine.executors import PATIENCE, Gate, interpose


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        url: where, without a slash at the end.
        engine: what it serves.
        server: uvicorn's, for stopping it.
    """

    url: str
    engine: AsyncLLMEngine
    server: Server
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def stats(self) -> EngineStats:
        return self.engine.engine.stats()

    def is_idle(self) -> bool:
        """Whether nothing runs or waits, and every block is free or cached."""
        stats = self.stats()
        assert stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks == stats.num_blocks
        return (stats.num_running, stats.num_waiting, stats.num_used_blocks, stats.num_used_cpu_blocks) == (0, 0, 0, 0)

    @contextlib.contextmanager
    def held(self) -> Iterator[Gate]:
        """Nothing is computed while the gate is shut, however slow the rest of the test is; for an idle server."""
        gate = interpose(self.engine.engine, Gate)
        try:
            yield gate
        finally:
            gate.is_open.set()

    def stop(self) -> None:
        """What SIGTERM does."""
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(self.server.stop)


@contextlib.contextmanager
def running(
    engine: AsyncLLMEngine, drain_timeout: float = PATIENCE, port: int = 0, **options: Any
) -> Iterator[Running]:
    """Serve an engine, with ``create_app``'s options; stop when the context ends. The engine is shut down with it."""
    with running_app(create_app(engine, **options), engine, drain_timeout, port) as server:
        yield server


@contextlib.contextmanager
def running_app(app: FastAPI, engine: AsyncLLMEngine, drain_timeout: float, port: int = 0) -> Iterator[Running]:
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = Server(app, engine, drain_timeout)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, server, thread)
            yield running
        finally:
            if thread.is_alive():
                running.stop()
            thread.join(PATIENCE)
            engine.shutdown()
            assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], bool]) -> None:
    """The server goes on by itself, so some things are true only soon."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
