"""``mini-infer bench``: its workload, the floor it works out, and what it reports of an engine and of a server."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from mini_infer import AsyncLLMEngine
from mini_infer.cli import app
from mini_infer.cli.bench import Timeline
from mini_infer.cli.roofline import Machine, Work, floor, step_work
from mini_infer.cli.workload import Workload, parse_range
from mini_infer.exceptions import InvalidConfigError
from mini_infer.models import read_config
from tests.cli.test_cli import needs_the_model
from tests.models.checkpoints import FAMILIES, make_checkpoint, random_config, random_model

MACHINE = Machine(bytes_per_second=1e9, flops_per_second=1e10)


# ---- the workload --------------------------------------------------------------------------------------------------


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


# ---- the roofline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_work_of_a_prompt_is_what_transformers_does(tmp_path: Path, family: str, seed: int) -> None:
    """PyTorch counts the operations of transformers' linear layers; the attended pairs are counted one by one."""
    hf = random_config(family, seed)
    model = random_model(hf, seed)
    make_checkpoint(tmp_path, family, seed)
    config = read_config(tmp_path)
    attention = config.layers[0].attention
    length = random.Random(seed).randint(1, 20)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(length)[None] % 50, logits_to_keep=1)
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    # Rotary tables are made by a batched product, and attention may be one; linear layers are plain ones.
    linear = sum(count for op, count in by_op.items() if op in ("aten.mm", "aten.addmm"))

    work = step_work(config, 4, [length], [])
    assert work.linear_flops == linear
    pairs = sum(
        1
        for window in (layer.attention.sliding_window for layer in config.layers)
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    )
    assert work.attention_flops == 4 * attention.num_heads * attention.head_dim * pairs
    assert work.kv_bytes == 4 * 2 * length * config.num_layers * attention.num_kv_heads * attention.head_dim


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_weights_are_the_matrices_of_transformers(tmp_path: Path, family: str, seed: int) -> None:
    hf = random_config(family, seed)
    model = random_model(hf, seed).to(torch.bfloat16)
    make_checkpoint(tmp_path, family, seed)
    linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}  # lm_head may be tied
    work = step_work(read_config(tmp_path), 2, [3], [4, 5])
    assert work.weight_bytes == sum(weight.nbytes for weight in linear.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_decode_step_reads_what_each_sequence_sees(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, "mistral", seed)
    config = read_config(tmp_path)
    attention = config.layers[0].attention
    contexts = [random.Random(seed).randint(1, 30) for _ in range(4)]
    seen = sum(
        len([key for key in range(context) if window is None or context - 1 - key < window])
        for window in (layer.attention.sliding_window for layer in config.layers)
        for context in contexts
    )
    work = step_work(config, 2, [], contexts)
    # What is seen is read, but for the new token, which is written.
    assert work.kv_bytes == seen * 2 * 2 * attention.num_kv_heads * attention.head_dim
    assert work.attention_flops == seen * 4 * attention.num_heads * attention.head_dim


@pytest.mark.parametrize("seats", [1, 2, 7, 100])
def test_seats_change_the_steps_and_nothing_of_the_arithmetic(tmp_path: Path, seats: int) -> None:
    make_checkpoint(tmp_path, "qwen3", 0)
    config = read_config(tmp_path)
    workload = Workload.draw(7, (1, 30), (1, 12), seed=seats)
    least, alone = floor(config, 4, workload, MACHINE, seats), floor(config, 4, workload, MACHINE, 1)
    assert alone.steps == workload.num_output_tokens
    if seats >= 7:
        assert least.steps == max(workload.num_outputs)
    assert -(-workload.num_output_tokens // seats) <= least.steps <= alone.steps
    assert least.work.linear_flops == alone.work.linear_flops
    assert least.work.attention_flops == alone.work.attention_flops
    assert least.work.kv_bytes == alone.work.kv_bytes
    assert least.work.weight_bytes * alone.steps == alone.work.weight_bytes * least.steps
    assert least.seconds <= alone.seconds


def test_the_floor_names_what_binds(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", 0)
    config = read_config(tmp_path)
    workload = Workload.draw(3, (5, 9), (4, 4))
    slow_memory = floor(config, 4, workload, Machine(1.0, 1e12), 256)
    assert (slow_memory.limit, slow_memory.compute_seconds) == ("memory", 0)
    assert slow_memory.seconds == slow_memory.work.weight_bytes + slow_memory.work.kv_bytes
    slow_compute = floor(config, 4, workload, Machine(1e12, 1.0), 256)
    assert (slow_compute.limit, slow_compute.memory_seconds) == ("compute", 0)
    assert slow_compute.seconds == slow_compute.work.linear_flops + slow_compute.work.attention_flops


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4) + Work(10, 20, 30, 40) == Work(11, 22, 33, 44)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_machine_can_do_something(dtype: torch.dtype) -> None:
    machine = Machine.measure(torch.device("cpu"), dtype)
    assert 1e8 < machine.bytes_per_second < 1e14
    assert 1e7 < machine.flops_per_second < 1e16
    assert machine.best(Machine(1.0, 1e20)) == Machine(machine.bytes_per_second, 1e20)


# ---- an engine -----------------------------------------------------------------------------------------------------

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
    for name in ("ttft_seconds", "itl_seconds", "e2e_seconds"):
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
    steps, roofline = report["steps"], report["roofline"]
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    workload = Workload.draw(5, (3, 40), (1, 9), seed=3)
    # Every token but each request's last goes through the model.
    computed = workload.num_input_tokens + workload.num_output_tokens - 5
    assert steps["count"] * steps["tokens_mean"] == pytest.approx(computed)
    assert steps["count"] >= roofline["fewest_steps"] >= workload.num_output_tokens / 2
    assert 0 < steps["peak_used_blocks"] <= steps["num_blocks"]
    assert roofline["floor_seconds"] == pytest.approx(roofline["memory_seconds"] + roofline["compute_seconds"])
    assert roofline["share"] == pytest.approx(roofline["floor_seconds"] / report["seconds"])
    assert roofline["limit"] in ("memory", "compute")


@needs_the_model
def test_its_tables() -> None:
    shown = bench("--requests=2", "--input-len=5", "--output-len=3", "--temperature=0.8", "--top-k=5").stdout
    for words in ("TTFT", "ITL", "E2E", "KV blocks", "GB/s", "of what this machine can do", "已达到本机能力的"):
        assert words in shown


@needs_the_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-len", "9:3"], "input_len must be LOW:HIGH"),
        (["--concurrency", "3"], "add --url"),
        (["--request-rate", "3"], "add --url"),
        (["--top-p", "0"], "top_p"),
        (["--output-len", "1000000"], "do not fit max_model_len"),
        (["--url", "http://127.0.0.1:1", "--max-num-seqs", "3"], "the server has its own"),
        (["--url", "http://127.0.0.1:1", "--request-rate", "0"], "request_rate"),
        (["--url", "localhost:8000"], "http://127.0.0.1:8000"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_used(arguments: list[str], message: str) -> None:
    done = bench(*arguments, status=2)
    assert message in done.stderr and not done.stdout


# ---- a server ------------------------------------------------------------------------------------------------------


@needs_the_model
def test_a_server() -> None:
    pytest.importorskip("fastapi")
    from tests.serving.running import running

    with running(AsyncLLMEngine(dtype="float32", num_gpu_blocks=256), api_key="secret") as server:
        report = as_json("--url", server.url, *WORKLOAD, MINI_INFER_API_KEY="secret")
        check_figures(report)
        assert (report["failed"], report["asked_output_tokens"]) == (0, report["output_tokens"])

        paced = as_json(
            "--url",
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
        known = ("--url", server.url, "--api-key", "secret")
        assert "max_model_len" in bench(*known, "--input-len=100000", "--requests=2", status=1).stderr
        assert "401" in bench("--url", server.url, "--api-key", "wrong", status=1).stderr
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

    assert "mini-infer serve" in bench("--url", server.url, status=1).stderr


def test_tokens_that_come_together_share_the_time() -> None:
    timeline = Timeline(num_input=4, arrival=10.0)
    timeline.add(12.0, 1)
    timeline.add(13.0, 2)
    timeline.add(13.5, 0)
    assert timeline.tokens == [12.0, 12.5, 13.0]
    assert (timeline.ttft, timeline.gaps, timeline.latency) == (2.0, [0.5, 0.5], 3.0)
