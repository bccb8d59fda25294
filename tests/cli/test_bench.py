"""``mini-infer bench``: its workload, and what it reports of an engine."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mini_infer.cli import app
from mini_infer.cli.bench import Workload, parse_range
from mini_infer.exceptions import InvalidConfigError
from tests.cli.test_cli import needs_the_model


@pytest.mark.parametrize(
    ("requests", "input_len", "output_len", "tokens_in", "tokens_out"),
    [
        (16, (32, 256), (16, 128), 2182, 1191),
        (64, (32, 256), (16, 128), 9392, 5155),
        (64, (32, 64), (32, 64), 3025, 3159),
    ],
)
def test_the_workload_is_always_the_same(
    requests: int, input_len: tuple[int, int], output_len: tuple[int, int], tokens_in: int, tokens_out: int
) -> None:
    """The totals of the workloads whose figures are published."""
    workload = Workload.draw(requests, input_len, output_len)
    assert (workload.num_input_tokens, workload.num_output_tokens) == (tokens_in, tokens_out)
    assert {len(p) for p in workload.prompts} <= set(range(input_len[0], input_len[1] + 1))
    assert workload == Workload.draw(requests, input_len, output_len)
    assert workload != Workload.draw(requests, input_len, output_len, seed=1)


def test_ranges() -> None:
    assert parse_range("x", "32:256") == (32, 256)
    assert parse_range("x", "7") == (7, 7)
    for text in ("", "0", "0:5", "6:5", "a:b", "1:2:3", "-3"):
        with pytest.raises(InvalidConfigError, match="input_len"):
            parse_range("input_len", text)


WORKLOAD = ("--requests", "5", "--input-len", "3:40", "--output-len", "1:9", "--seed", "3")


def check_figures(report: dict[str, Any]) -> None:
    workload = Workload.draw(5, (3, 40), (1, 9), seed=3)
    assert report["requests"] == 5
    assert report["input_tokens"] == workload.num_input_tokens
    assert report["output_tokens"] == workload.num_output_tokens
    assert report["output_tokens_per_second"] == pytest.approx(workload.num_output_tokens / report["seconds"])
    assert report["total_tokens_per_second"] == pytest.approx(
        report["input_tokens_per_second"] + report["output_tokens_per_second"]
    )
    for name in {"ttft_seconds", "itl_seconds", "tpot_seconds", "e2e_seconds"} & report.keys():
        spread = report[name]
        assert 0 <= spread["p50"] <= spread["p90"] <= spread["p99"] <= report["seconds"]
    assert 0 < report["ttft_seconds"]["p99"] <= report["e2e_seconds"]["p99"]


def bench(*arguments: str, status: int = 0, **environment: str) -> Result:
    done = CliRunner().invoke(app, ["bench", *arguments], env=environment)
    assert done.exit_code == status, done.output
    return done


def as_json(*arguments: str, **environment: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(bench("--json", *arguments, **environment).stdout)
    return report


@needs_the_model
def test_an_engine() -> None:
    report = as_json(*WORKLOAD, "--dtype", "float32", "--max-num-seqs", "2")
    check_figures(report)
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    workload = Workload.draw(5, (3, 40), (1, 9), seed=3)
    assert workload.num_output_tokens / 2 <= report["steps"] <= workload.num_output_tokens
    assert 0 < report["peak_used_blocks"] <= report["num_blocks"] and report["preemptions"] == 0


@needs_the_model
def test_its_tables() -> None:
    shown = bench("--requests=2", "--input-len=5", "--output-len=3", "--temperature=0.8", "--top-k=5").stdout
    for words in ("TTFT", "TPOT", "E2E", "KV blocks", "首词元时间"):
        assert words in shown


@needs_the_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-len", "9:3"], "input_len must be LOW:HIGH"),
        (["--top-p", "1.5"], "top_p"),
        (["--output-len", "1000000"], "do not fit max_model_len"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_used(arguments: list[str], message: str) -> None:
    done = bench(*arguments, status=2)
    assert message in done.stderr and not done.stdout
