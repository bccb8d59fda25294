"""The floor of a workload, and how near a run came to it."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks.roofline import Machine, Work, app, floor, step_work
from mini_infer.cli.bench import Workload
from mini_infer.models import ModelConfig, read_config
from tests.cli.test_cli import needs_the_model
from tests.models.checkpoints import FAMILIES, make_checkpoint, random_config, random_model

MACHINE = Machine(bytes_per_second=1e9, flops_per_second=1e10)


def heads_of(config: ModelConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads and features of a head, which all layers of these checkpoints share."""
    attention = config.layers[0].attention
    return attention.num_heads, attention.num_kv_heads, attention.head_dim


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_work_of_a_prompt_is_what_transformers_does(tmp_path: Path, family: str, seed: int) -> None:
    """PyTorch counts the operations of transformers' linear layers; the attended pairs are counted one by one."""
    hf = random_config(family, seed)
    model = random_model(hf, seed)
    make_checkpoint(tmp_path, family, seed)
    config = read_config(tmp_path)
    length = random.Random(seed).randint(1, 20)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(length)[None] % 50, logits_to_keep=1)
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    # Rotary tables are made by a batched product, and attention may be one; linear layers are plain ones.
    linear = sum(count for op, count in by_op.items() if op in ("aten.mm", "aten.addmm"))

    work = step_work(config, 4, [length], [])
    assert work.linear_flops == linear
    heads, kv_heads, head_dim = heads_of(config)
    pairs = sum(
        1
        for layer in config.layers
        for query in range(length)
        for key in range(query + 1)
        if layer.attention.sliding_window is None or query - key < layer.attention.sliding_window
    )
    assert work.attention_flops == 4 * heads * head_dim * pairs
    assert work.kv_bytes == 4 * 2 * length * config.num_layers * kv_heads * head_dim


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
    contexts = [random.Random(seed).randint(1, 30) for _ in range(4)]
    seen = sum(
        len([key for key in range(context) if window is None or context - 1 - key < window])
        for window in (layer.attention.sliding_window for layer in config.layers)
        for context in contexts
    )
    heads, kv_heads, head_dim = heads_of(config)
    work = step_work(config, 2, [], contexts)
    # What is seen is read, but for the new token, which is written.
    assert work.kv_bytes == seen * 2 * 2 * kv_heads * head_dim
    assert work.attention_flops == seen * 4 * heads * head_dim


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


@needs_the_model
def test_a_run_beside_its_floor() -> None:
    flags = ["--requests=5", "--input-len=3:40", "--output-len=1:9", "--seed=3", "--dtype=float32", "--max-num-seqs=2"]
    done = CliRunner().invoke(app, [*flags, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    roofline, workload = report["roofline"], Workload.draw(5, (3, 40), (1, 9), seed=3)
    assert report["output_tokens"] == workload.num_output_tokens
    assert report["steps"] >= roofline["fewest_steps"] >= workload.num_output_tokens / 2
    assert roofline["floor_seconds"] == pytest.approx(roofline["memory_seconds"] + roofline["compute_seconds"])
    assert roofline["share"] == pytest.approx(roofline["floor_seconds"] / report["seconds"])
    assert roofline["limit"] in ("memory", "compute")
    shown = CliRunner().invoke(app, ["--requests=2", "--input-len=5", "--output-len=3"]).stdout
    for words in ("TTFT", "GB/s", "of what this machine can do", "已达到本机能力的"):
        assert words in shown
