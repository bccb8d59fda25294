"""``mini-infer info`` foretells what an engine lays out, without the weights."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from safetensors import safe_open
from typer.testing import CliRunner, Result

from mini_infer import LLM, kernels
from mini_infer.cli import app
from mini_infer.config import BUNDLED_MODEL
from mini_infer.executor.quality import stored_bytes
from mini_infer.models import load_model, read_config
from tests.cli.test_cli import needs_the_model
from tests.models.checkpoints import FAMILIES, make_checkpoint
from tests.models.gguf.test_model import SHAPE
from tests.models.gguf.writing import write_gguf


def info(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(app, ["info", "--device", "cpu", *arguments])
    assert done.exit_code == status, done.output
    return done


def facts(*arguments: str) -> dict[str, Any]:
    return json.loads(info("--json", *arguments).stdout)


def parameters_in(checkpoint: Path) -> int:
    """Numbers in the file."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as reader:
        shapes = [reader.get_slice(name).get_shape() for name in reader.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_file(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", family, seed=0)
    shown = facts(str(checkpoint), "--dtype", "float32")
    assert shown["model"]["num_parameters"] == parameters_in(checkpoint)
    assert shown["memory"]["weight_bytes"] == 4 * parameters_in(checkpoint)
    assert shown["model"]["checkpoint_bytes"] == (checkpoint / "model.safetensors").stat().st_size


@needs_the_model
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "float32", "max_num_seqs": 7, "block_size": 24},
        {"num_gpu_blocks": 5, "num_cpu_blocks": 3},
        {"max_model_len": 100, "block_size": 7, "dtype": "float64"},
        {"max_model_len": 100000},
        {"kv_cache_dtype": "int8"},
    ],
    ids=str,
)
def test_the_plan_is_what_an_engine_does(fields: dict[str, Any]) -> None:
    llm = LLM(device="cpu", **fields)
    memory = facts(*(f"--{name}={value}" for name, value in fields.items()))["memory"]
    stats = llm.stats()
    assert (memory["num_blocks"], memory["num_cpu_blocks"]) == (stats.num_blocks, stats.num_cpu_blocks)
    assert memory["max_model_len"] == llm.max_model_len
    assert memory["num_tokens"] == stats.num_blocks * llm.config.block_size
    shape = llm.model_config
    bytes_each = {"float32": 4, "float64": 8, "bfloat16": 2}[memory["dtype"]]
    heads = [(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in shape.layers]
    if "kv_cache_dtype" in fields:
        bytes_each, heads = 1, [(number, width + 2) for number, width in heads]
    assert memory["kv_bytes_per_token"] == sum(2 * number * width for number, width in heads) * bytes_each
    assert memory["rotary_bytes"] == 2 * llm.max_model_len * shape.layers[0].attention.head_dim // 2 * 4
    assert memory["kv_bytes"] == memory["num_tokens"] * memory["kv_bytes_per_token"]
    # As many of the longest as there are blocks for: one more would need more blocks than there are.
    blocks_each = -(-llm.max_model_len // llm.config.block_size)
    assert memory["num_longest"] * blocks_each <= stats.num_blocks < (memory["num_longest"] + 1) * blocks_each
    assert (memory["warning"] is not None) == (
        fields in ({"num_gpu_blocks": 5, "num_cpu_blocks": 3}, {"max_model_len": 100000})
    )


@needs_the_model
def test_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = info("--num-cpu-blocks", "4").stdout
    assert max(map(cell_len, shown.splitlines())) <= 80
    edges = {cell_len(line) for line in shown.split("Memory plan")[0].splitlines() if line.startswith("│")}
    assert len(edges) == 1, "wide characters do not bend the right edge"
    assert all(op in shown for op in kernels.OPS)
    assert "Qwen3ForCausalLM" in shown and "5,770,880" in shown and "swap blocks" in shown


def test_ranks_have_shares(tmp_path: Path) -> None:
    """Of what is in the file each matrix is shared out, and vectors, all of them of norms, are with both shards."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3", seed=0, attention_bias=False, **sizes)
    with safe_open(checkpoint / "model.safetensors", framework="pt") as reader:
        shapes = [reader.get_slice(name).get_shape() for name in reader.keys()]  # noqa: SIM118
    expected = sum(math.prod(shape) * (2 if len(shape) == 1 else 1) for shape in shapes)
    layout = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--dtype", "float32")
    ranks = facts(str(checkpoint), *layout)["ranks"]
    assert [rank["layers"] for rank in ranks] == [[0, 2], [0, 2], [2, 4], [2, 4]]
    assert [(rank["num_heads"], rank["num_kv_heads"]) for rank in ranks] == 4 * [(2, 1)]
    assert sum(rank["num_parameters"] for rank in ranks) == expected
    assert sum(rank["weight_bytes"] for rank in ranks) == 4 * expected
    refused = info(str(checkpoint), "--tensor-parallel-size", "3", status=2).output
    assert "1, 2, 4 devices" in " ".join(refused.split())


def test_no_weights_are_needed(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3", seed=0)
    expected = facts(str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    shown = facts(str(checkpoint))
    assert shown["model"].pop("checkpoint_bytes") is None and expected["model"].pop("checkpoint_bytes")
    assert shown == expected
    assert "not on this machine yet" in info(str(checkpoint)).stdout


@needs_the_model
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["no/such/model"], 1, "no/such/model does not exist"),
        (["--device", "npu:0"], 2, "device='npu:0' is not a device"),
        (["--kernel-backend", "nope"], 2, "nope"),
        (["--max-model-len", "64", "--num-gpu-blocks", "3"], 1, "max_model_len=64 does not fit the KV memory"),
        (["--block-size", str(10**7)], 1, "no KV block fits on cpu"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], status: int, message: str) -> None:
    error = info(*arguments, status=status).stderr
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@needs_the_model
def test_the_bundled_model_is_the_default() -> None:
    assert facts()["model"]["directory"] == BUNDLED_MODEL


@needs_the_model
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_that_are_quantised_on_load(scheme: str) -> None:
    """As many bytes as the loaded model's matrices count, to the byte."""
    shown = facts("--quantization", scheme)["memory"]["weight_bytes"]
    path = Path(BUNDLED_MODEL)
    config = replace(read_config(path), max_position_embeddings=64)
    model = load_model(path, config, torch.bfloat16, "cpu", kernels.resolve("cpu"), scheme)
    assert shown == stored_bytes(model)
    assert shown < 0.7 * facts()["memory"]["weight_bytes"]


def test_a_gguf_file_takes_about_what_it_has(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "plain", "qwen3", 0, **SHAPE, rope_scaling=None, num_hidden_layers=1)
    write_gguf(tmp_path / "m.gguf", checkpoint, 0, ("Q8_0", "Q4_1"))
    shown = facts(str(tmp_path / "m.gguf"))
    assert shown["memory"]["weight_bytes"] == (tmp_path / "m.gguf").stat().st_size
