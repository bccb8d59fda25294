"""Connections that do nothing, and clients that do not read: each is given up, and nobody else notices."""

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from mini_infer import AsyncLLMEngine
from mini_infer.serving import connections
from mini_infer.serving import server as server_module
from mini_infer.serving.connections import FewLines

from .running import Running, running, wait_until


@pytest.fixture(scope="module")
def engine_options() -> dict[str, Any]:
    return {"dtype": "float32", "num_gpu_blocks": 512}


@pytest.fixture(scope="module")
def impatient(engine_options: dict[str, Any]) -> Iterator[Running]:
    """A server that waits half a second for headers and for readers, and has room for twenty connections."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "HEADER_SECONDS", 0.5)
        patch.setattr(connections, "SEND_SECONDS", 0.5)
        patch.setattr(server_module, "max_connections", lambda: 20)
        with running(AsyncLLMEngine(**engine_options)) as server:
            yield server


@pytest.mark.parametrize("beginning", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_headers_that_do_not_come(impatient: Running, beginning: bytes) -> None:
    with socket.create_connection(impatient.address, timeout=60) as connection:
        connection.sendall(beginning)
        assert_closed(connection)


def test_headers_of_a_second_request_that_do_not_come(impatient: Running) -> None:
    with socket.create_connection(impatient.address, timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health")
        assert_closed(connection)


def test_a_client_that_never_reads(impatient: Running) -> None:
    """Its request is aborted, so it holds nothing."""
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 12, "logprobs": 20}
    content = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(impatient.address)
        before = impatient.stats().num_generated_tokens
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
        )
        wait_until(lambda: impatient.stats().num_generated_tokens > before)
        wait_until(impatient.is_idle)
        assert impatient.stats().num_generated_tokens - before < 12 * 900


def test_more_silent_connections_than_there_is_room_for(impatient: Running) -> None:
    """The oldest make room. A stream that is under way stays, and so do new clients get in."""
    with ExitStack() as stack, httpx.Client(base_url=impatient.url, timeout=60) as client:
        body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True}
        answer = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
        lines = answer.iter_lines()
        next(lines)
        for _ in range(60):
            stack.enter_context(socket.create_connection(impatient.address, timeout=60))
        assert httpx.get(f"{impatient.url}/health", timeout=60).status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_open_files_are_as_many_as_allowed() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = connections.max_connections()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == before[1] and soft >= before[0]
    assert 8 <= most <= connections.MAX_CONNECTIONS
    assert soft == resource.RLIM_INFINITY or most < soft


def test_the_log_is_not_flooded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(connections.time, "monotonic", lambda: now)
    noisy = logging.getLogger("noisy")
    noisy.addFilter(FewLines(3, 60.0))
    for _ in range(1000):
        noisy.warning("again %d", 1)
    assert [record.getMessage() for record in caplog.records] == ["again 1"] * 3
    now = 61.0
    noisy.warning("again %d", 2)
    assert caplog.records[-1].getMessage() == "again 2 (997 lines before it were left out)"


def assert_closed(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        assert connection.recv(1000) == b""
