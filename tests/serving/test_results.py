"""Ask now, fetch later: the bodies of dLLM-Serve's document, field by field."""

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mini_infer import LLM, AsyncLLMEngine, SamplingParams
from mini_infer.executor.runner import ModelRunner
from mini_infer.serving import kept, results
from tests.engine.executors import runner_of

from .running import Running, running, wait_until
from .test_http import JSON, assert_error


def fetch(http: httpx.Client, number: int) -> dict[str, Any]:
    """The result, once it is there."""
    body: dict[str, Any] = {}

    def is_there() -> bool:
        nonlocal body
        answer = http.get(f"/v1/result/{number}")
        assert answer.status_code == 200
        body = answer.json()
        return bool(body["status"] != "running")

    wait_until(is_there)
    return body


def test_the_documents_example(http: httpx.Client, server: Running, offline: LLM) -> None:
    body = {"prompt": "Tell me about AI", "temperature": 0.0, "gen_length": 128}
    (number,) = http.post("/v1/generate", json=body).json()["request_ids"]
    body = fetch(http, number)
    expected = offline.generate("Tell me about AI", SamplingParams(temperature=0, max_tokens=128))[0]
    assert body == {"request_id": number, "status": "finished", "text": expected.text}
    assert http.get(f"/v1/result/{number}").json() == body, "it is kept"


def test_running_has_no_text_yet(http: httpx.Client, server: Running) -> None:
    answer = http.post("/v1/generate", json={"prompt": "Once", "max_tokens": 1000, "ignore_eos": True})
    assert answer.status_code == 200 and answer.json()["status"] == "submitted"
    (number,) = answer.json()["request_ids"]
    assert http.get(f"/v1/result/{number}").json() == {"request_id": number, "status": "running", "text": None}
    answer = http.delete(f"/v1/result/{number}")
    assert (answer.status_code, answer.json()) == (200, {"request_id": number, "status": "deleted"})
    assert_error(http.get(f"/v1/result/{number}"), 404)
    assert_error(http.delete(f"/v1/result/{number}"), 404)
    wait_until(server.is_idle)


def test_a_batch(http: httpx.Client, offline: LLM) -> None:
    prompts = ["Prompt 1", "Prompt 2", "什么是块？"]
    answer = http.post("/v1/generate_batch", json={"prompts": prompts, "temperature": 0.0, "gen_length": 16}).json()
    numbers = answer["request_ids"]
    assert answer == {"request_ids": numbers, "status": "submitted"} and len(set(numbers)) == 3
    assert all(0 <= number < 2**53 for number in numbers) and max(numbers) > 2**40, "nobody guesses them"
    expected = offline.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    for number, output in zip(answer["request_ids"], expected, strict=True):
        assert fetch(http, number)["text"] == output.text


def test_a_hundred_tokens_unless_told(http: httpx.Client, server: Running) -> None:
    before = server.stats().num_generated_tokens
    (number,) = http.post("/v1/generate", json={"prompt": "Once", "ignore_eos": True}).json()["request_ids"]
    fetch(http, number)
    assert server.stats().num_generated_tokens - before == 100


def test_health(http: httpx.Client) -> None:
    for path in ("/v1/health", "/health"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("number", [10**6, -1, 10**30])
def test_unknown(http: httpx.Client, number: int) -> None:
    assert assert_error(http.get(f"/v1/result/{number}"), 404)["code"] == "result_not_found"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {}),
        ("/v1/generate", {"prompt": 5}),
        ("/v1/generate", {"prompt": ""}),
        ("/v1/generate", {"prompt": "x", "temperature": -1}),
        ("/v1/generate", {"prompt": "x", "gen_length": 0}),
        ("/v1/generate", {"prompt": "x", "gen_length": 5, "max_tokens": 6}),
        ("/v1/generate", {"prompt": "x", "steps": 64}),
        ("/v1/generate", {"prompt": "x", "remasking": "random"}),
        ("/v1/generate", {"prompt": "x", "n": 2000}),
        ("/v1/generate_batch", {"prompts": "x"}),
        ("/v1/generate_batch", {"prompts": []}),
        ("/v1/generate_batch", {"prompts": ["x", 5]}),
        ("/v1/generate_batch", {"prompts": ["x"] * 1025}),
        ("/v1/generate_batch", {"prompts": ["x"] * 2, "n": 600}),
    ],
    ids=str,
)
def test_what_is_wrong_is_422(http: httpx.Client, server: Running, path: str, body: Any) -> None:
    assert_error(http.post(path, json=body), 422)
    assert server.is_idle()


def test_neither_json_nor_a_number(http: httpx.Client) -> None:
    assert_error(http.post("/v1/generate", content=b"{", headers=JSON), 422)
    assert_error(http.get("/v1/result/abc"), 422)


def test_old_results_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "KEPT_RESULTS", 2)
    now = 0.0
    monkeypatch.setattr(kept, "time", SimpleNamespace(monotonic=lambda: now))
    engine = AsyncLLMEngine(num_gpu_blocks=64, max_model_len=256)
    with running(engine) as server, httpx.Client(base_url=server.url, timeout=60) as http:

        def finished() -> int:
            (number,) = http.post("/v1/generate", json={"prompt": "Once", "max_tokens": 1}).json()["request_ids"]
            fetch(http, number)
            return int(number)

        numbers = [finished() for _ in range(4)]
        assert [http.get(f"/v1/result/{number}").status_code for number in numbers] == [404, 404, 200, 200]
        now = results.KEPT_SECONDS + 1.0
        assert [http.get(f"/v1/result/{number}").status_code for number in numbers] == [404] * 4


def test_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises, and a request that takes longer than is allowed."""
    engine = AsyncLLMEngine(num_gpu_blocks=128, max_num_seqs=1)
    forward = ModelRunner._forward

    def fail(self: ModelRunner, batch: Any) -> Any:
        if self is runner_of(engine.engine):
            raise RuntimeError("cosmic ray")
        return forward(self, batch)

    with running(engine, request_timeout=0.5) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        monkeypatch.setattr(ModelRunner, "_forward", fail)
        (number,) = http.post("/v1/generate", json={"prompt": "Once"}).json()["request_ids"]
        body = fetch(http, number)
        assert (body["status"], body["text"]) == ("failed", None) and "step" in body["error"]
        monkeypatch.setattr(ModelRunner, "_forward", forward)
        endless = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "n": 100}
        (number,) = http.post("/v1/generate", json=endless).json()["request_ids"]
        body = fetch(http, number)
        assert (body["status"], body["text"]) == ("failed", None) and "0.5 seconds" in body["error"]
        wait_until(server.is_idle)
