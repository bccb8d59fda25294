"""Workers of peers, as far as they run without the peer."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.workers import channel, llamacpp
from benchmarks.workers.channel import Job
from mini_infer.models.gguf import GgufModel
from tests.engine.checkpoints import make_engine_checkpoint

pytest.importorskip("gguf")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_llama_cpp_gets_the_same_numbers(family: str, tmp_path: Path) -> None:
    """Read by the engine's own reader of the format, which puts names and rotary pairs back."""
    plain = {"rope_scaling": None, "attention_bias": False} | ({"mlp_bias": False} if family == "llama" else {})
    model = make_engine_checkpoint(tmp_path, family, dtype=torch.bfloat16, **plain)
    llamacpp._convert(model, tmp_path / "model.gguf")
    made, truth = GgufModel(tmp_path / "model.gguf"), load_file(model / "model.safetensors")
    assert set(made.stored) == set(truth)
    for name, tensor in truth.items():
        assert torch.equal(made.read(name).bfloat16(), tensor), name


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    wide = make_engine_checkpoint(tmp_path / "wide", rope_scaling=None)  # float32
    with pytest.raises(ValueError, match="F32; bfloat16 is expected"):
        llamacpp._convert(wide, tmp_path / "model.gguf")
    (wide / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="'mamba' is not converted"):
        llamacpp._convert(wide, tmp_path / "model.gguf")


def test_how_transformers_is_told_to_sample() -> None:
    assert Job([], []).sampling == {"do_sample": False}
    assert Job([], [], 0.8, -1, 0.9).sampling == {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.9}


def test_a_worker_answers_until_it_fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def load(model: str, options: dict[str, Any]) -> dict[str, Any]:
        print("a library's greeting")
        return {"add": lambda a, b: a + b, "what": lambda: [model, options]}

    monkeypatch.setattr(sys, "argv", ["worker", "MODEL", '{"dtype": "float32"}'])
    monkeypatch.setattr(sys, "stdin", io.StringIO('["add", 1, 2]\n["what"]\n["add", 1]\n["add", 1, 2]\n'))
    replies = io.StringIO()
    monkeypatch.setattr(channel.os, "dup", lambda number: number)
    monkeypatch.setattr(channel.os, "dup2", lambda old, new: new)
    monkeypatch.setattr(channel.os, "fdopen", lambda number, mode: replies)
    channel.serve("numpy", load)
    messages = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [message.get("answer") for message in messages[1:3]] == [3, ["MODEL", {"dtype": "float32"}]]
    assert len(messages) == 4 and messages[3]["error"].startswith("TypeError")
