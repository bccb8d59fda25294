"""``mini-infer quality`` and ``mini-infer quantize``, on the bundled model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mini_infer.cli import app
from mini_infer.config import BUNDLED_MODEL

TEXT = "The KV cache holds the keys and values of tokens that were read.\n分页注意力把缓存分成块。\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_is_written_is_what_loading_makes(tmp_path: Path, text: Path) -> None:
    run("quantize", BUNDLED_MODEL, tmp_path / "out", "--quantization", "int8")
    options = ("--text", text, "--dtype", "float32", "--json")
    written = json.loads(run("quality", tmp_path / "out", "--against", BUNDLED_MODEL, *options))
    loaded = json.loads(run("quality", BUNDLED_MODEL, "--quantization", "int8", *options))
    assert 0 < written["mean_kld"] < 0.005
    assert 0 < loaded["mean_kld"] < 0.005
    assert loaded["bytes_per_weight"] < written["bytes_per_weight"] < written["base_bytes_per_weight"]
    assert loaded["num_tokens"] == written["num_tokens"] > 50
    shown = run("quality", BUNDLED_MODEL, "--quantization", "int4", "--text", text)
    assert "mean KLD" in shown and "困惑度" in shown


def test_nothing_to_compare() -> None:
    result = CliRunner().invoke(app, ["quality", BUNDLED_MODEL])
    assert result.exit_code != 0
    assert "name the model to compare with" in " ".join(result.output.split())
