"""How a server ends, and how it does not: signals, steps that raise, ports that are taken."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mini_infer import AsyncLLMEngine, EngineConfig
from mini_infer.exceptions import InvalidConfigError
from mini_infer.executor.runner import ModelRunner
from mini_infer.serving import serve
from tests.engine.executors import runner_of

from .running import PATIENCE, Running, running, wait_until
from .test_http import assert_error

ROOT = Path(__file__).parents[2]
ENDLESS: dict[str, Any] = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}


def small_engine(**fields: Any) -> AsyncLLMEngine:
    return AsyncLLMEngine(dtype="float32", num_gpu_blocks=256, **fields)


class TestDraining:
    def test_what_runs_finishes_and_nobody_else_comes_in(self) -> None:
        with running(small_engine()) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.stop()
                with httpx.Client(base_url=server.url, timeout=60) as other:
                    wait_until(lambda: other.get("/health").status_code == 503)
                    assert assert_error(other.post("/v1/completions", json={"prompt": "x"}), 503)["code"] == "draining"
                    assert_error(other.post("/v1/generate", json={"prompt": "x"}), 503)
                    assert_error(other.get("/v1/health"), 503)
                *_, last, done = [line for line in lines if line]
            assert done == "data: [DONE]"
            assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
            server.thread.join(PATIENCE)
            assert not server.thread.is_alive() and server.is_idle()

    def test_a_request_that_only_fetches_later_is_waited_for(self) -> None:
        with running(small_engine()) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            client.post("/v1/generate", json={"prompt": "Once", "max_tokens": 300, "ignore_eos": True})
            server.stop()
            server.thread.join(PATIENCE)
            assert server.stats().num_generated_tokens == 300

    @pytest.mark.parametrize("how", ["limit", "told twice"])
    def test_then_it_aborts(self, how: str) -> None:
        drain_timeout = 0.05 if how == "limit" else PATIENCE
        with (
            running(small_engine(), drain_timeout=drain_timeout) as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=ENDLESS | {"n": 100}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.stop()
            if how == "told twice":
                server.stop()
                server.stop()
            *_, last, done = [line for line in lines if line]
            error = json.loads(done[6:])["error"]
            assert (error["code"], error["type"]) == ("unavailable", "server_error"), "they are told so, not just left"
            assert json.loads(last[6:])["choices"][0]["finish_reason"] is None
            server.thread.join(PATIENCE)
            assert not server.thread.is_alive() and server.is_idle()


class TestProcess:
    @pytest.fixture
    def process(self) -> Iterator[subprocess.Popen[str]]:
        code = (
            "from mini_infer import EngineConfig\n"
            "from mini_infer.serving import serve\n"
            "serve(EngineConfig(num_gpu_blocks=256, kernel_backend='reference'), port=0, drain_timeout=30)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        yield process
        process.kill()
        process.wait()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        """It says where it listens, and only there; when told to stop it finishes what it does and exits with 0."""
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        with httpx.Client(base_url=url, timeout=60) as client:
            body = ENDLESS | {"max_tokens": 50}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(number)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(PATIENCE) == 0
        assert "Traceback" not in process.stderr.read()

    def test_a_port_that_is_taken_shows_before_the_model_is_loaded(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(InvalidConfigError, match=f"port {port}"):
                serve(EngineConfig(model="no/such/model"), port=port)
        with pytest.raises(InvalidConfigError, match="99999"):
            serve(EngineConfig(model="no/such/model"), port=99999)
        with pytest.raises(InvalidConfigError, match=r"203\.0\.113\.1"):
            serve(EngineConfig(model="no/such/model"), host="203.0.113.1")


class TestStepsThatRaise:
    @pytest.fixture
    def server(self) -> Iterator[Running]:
        with running(small_engine(max_num_seqs=3)) as server:
            yield server

    @pytest.fixture
    def fail_next_steps(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
        """So many steps fail; one that fails once is tried again."""
        forward, runner = ModelRunner._forward, runner_of(server.engine.engine)
        left = 0

        def fail(self: ModelRunner, batch: Any) -> Any:
            nonlocal left
            if self is runner and left:
                left -= 1
                raise RuntimeError("cosmic ray")
            return forward(self, batch)

        def arm(times: int) -> None:
            nonlocal left
            left = times

        monkeypatch.setattr(ModelRunner, "_forward", fail)
        return arm

    def test_nobody_notices_one(self, server: Running, fail_next_steps: Any) -> None:
        body = {"prompt": "Once", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            expected = client.post("/v1/completions", json=body).json()["choices"]
            fail_next_steps(1)
            assert client.post("/v1/completions", json=body).json()["choices"] == expected

    def test_a_broken_device_shows(self, server: Running, fail_next_steps: Any) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            fail_next_steps(10**9)
            assert_error(client.post("/v1/completions", json={"prompt": "Once"}), 500)
            wait_until(lambda: client.get("/health").status_code == 503)
            assert assert_error(client.get("/health"), 503)["code"] == "broken"
            fail_next_steps(0)
            assert client.post("/v1/completions", json={"prompt": "Once"}).status_code == 200
            assert client.get("/health").status_code == 200

    def test_only_those_under_way_fail(
        self, server: Running, fail_next_steps: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One streams, one waits for its whole answer, one is queued and lives on."""
        with (
            httpx.Client(base_url=server.url, timeout=60) as client,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as official,
            ThreadPoolExecutor() as threads,
        ):
            stream = official.completions.create(
                model="tutor",
                **{k: v for k, v in ENDLESS.items() if k != "ignore_eos"},
                extra_body={"ignore_eos": True},
            )
            next(iter(stream))
            whole = threads.submit(client.post, "/v1/completions", json=ENDLESS | {"stream": False, "n": 2})
            wait_until(lambda: server.stats().num_running == 3)
            queued = threads.submit(client.post, "/v1/completions", json={"prompt": "Once", "max_tokens": 3})
            wait_until(lambda: server.stats().num_waiting == 1)
            fail_next_steps(2)
            with pytest.raises(openai.APIError, match="a step of the engine failed"):
                list(stream)
            assert assert_error(whole.result(PATIENCE), 500)["code"] == "step_failed"
            assert queued.result(PATIENCE).status_code == 200
            wait_until(server.is_idle)
            assert client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 3}).status_code == 200
            assert client.get("/health").status_code == 200
        (record,) = [
            r for r in caplog.records if r.name == "mini_infer.engine.engine_thread" and r.levelname == "ERROR"
        ]
        assert "cmpl-" in record.getMessage() and record.exc_info is not None

    def test_the_engine_is_gone(self) -> None:
        engine = small_engine()
        with running(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            engine.shutdown()
            for path in ("/health", "/metrics", "/engine/events"):
                assert_error(client.get(path), 503)
            assert_error(client.post("/v1/completions", json={"prompt": "x"}), 503)


def test_without_the_extra() -> None:
    """Where the server's packages are missing, the import says which command brings them."""
    code = "import sys; sys.modules['uvicorn'] = None\nimport mini_infer.serving"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'mini-infer[serve]'")


def test_threads_end_with_the_server() -> None:
    before = set(threading.enumerate())
    with running(small_engine()) as server:
        httpx.get(f"{server.url}/health", timeout=60)
    assert {t for t in threading.enumerate() if not t.name.startswith(("asyncio_", "AnyIO"))} <= before
