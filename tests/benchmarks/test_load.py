"""The load generator against a server of ours: what it counts, and what it says when it cannot."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from benchmarks.load import Timeline, app
from mini_infer import AsyncLLMEngine
from mini_infer.cli.bench import Workload
from tests.cli.test_bench import check_figures
from tests.cli.test_cli import needs_the_model

WORKLOAD = ("--requests", "5", "--input-len", "3:40", "--output-len", "1:9", "--seed", "3")


def load(*arguments: str, status: int = 0, **environment: str) -> Result:
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == status, done.output
    return done


def as_json(*arguments: str, **environment: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(load("--json", *arguments, **environment).stdout)
    return report


@needs_the_model
def test_a_server() -> None:
    pytest.importorskip("fastapi")
    from tests.serving.running import running

    with running(AsyncLLMEngine(dtype="float32", num_gpu_blocks=256), api_key="secret") as server:
        report = as_json(server.url, *WORKLOAD, MINI_INFER_API_KEY="secret")
        check_figures(report)
        assert (report["failed"], report["asked_output_tokens"]) == (0, report["output_tokens"])

        paced = as_json(
            f"{server.url}/v1/",
            "--request-rate",
            "200",
            "--concurrency",
            "2",
            *WORKLOAD,
            "--api-key",
            "secret",
        )
        check_figures(paced)
        assert server.is_idle()

        # Too long for the model: the server's reason is shown.
        known = (server.url, "--api-key", "secret")
        assert "max_model_len" in load(*known, "--input-len=100000", "--requests=2", status=1).stderr
        assert "401" in load(server.url, "--api-key", "wrong", status=1).stderr
        # Only some of them: they are counted, and the others measured.
        some = as_json(*known, "--input-len=1:2000", "--requests=9", "--output-len=2", "--seed=1")
        fit = [
            p
            for p in Workload.draw(9, (1, 2000), (2, 2), seed=1).prompts
            if len(p) < server.engine.engine.max_model_len
        ]
        assert 0 < len(fit) < 9
        assert (some["requests"], some["failed"]) == (len(fit), 9 - len(fit))
        assert some["input_tokens"] == sum(map(len, fit)) and "max_model_len" in some["first_failure"]

    assert "mini-infer serve" in load(server.url, status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:1", "--request-rate", "0"], "request_rate"),
        (["http://127.0.0.1:1", "--input-len", "9:3"], "input_len must be LOW:HIGH"),
        (["localhost:8000"], "http://127.0.0.1:8000"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_used(arguments: list[str], message: str) -> None:
    done = load(*arguments, status=2)
    assert message in done.stderr and not done.stdout


def test_tokens_that_come_together_share_the_time() -> None:
    timeline = Timeline(num_input=4, arrival=10.0)
    timeline.add(12.0, 1)
    timeline.add(13.0, 2)
    timeline.add(13.5, 0)
    assert timeline.tokens == [12.0, 12.5, 13.0]
    assert (timeline.ttft, timeline.gaps, timeline.latency) == (2.0, [0.5, 0.5], 3.0)
