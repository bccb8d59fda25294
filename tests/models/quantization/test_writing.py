"""Quantised checkpoints that `mini-infer quantize` writes: they load again, and other programs read them."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mini_infer import kernels
from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models import load_model, read_config
from mini_infer.models.quantization import SCHEMES, schemes, writing
from mini_infer.models.quantization.writing import quantize_checkpoint

from ..checkpoints import make_checkpoint
from ..test_decoder import PagedRun

KERNELS = kernels.resolve("cpu")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("shards", [False, True])
def test_what_is_written_loads_again(
    tmp_path: Path, scheme: str, shards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "rope_scaling": None}
    source = make_checkpoint(tmp_path / "source", "qwen3", 0, torch.bfloat16, **options)
    (source / "tokenizer.json").write_text("{}")
    if shards:
        monkeypatch.setattr(writing, "FILE_BYTES", 20_000)
    monkeypatch.setattr(schemes, "rotated_int8", schemes.int8)  # a copy's int8 is not rotated
    quantize_checkpoint(source, tmp_path / "out", scheme)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == shards
    config = read_config(tmp_path / "out")
    assert config.quantization is not None and config.quantization.method == "compressed-tensors"
    tokens = random.Random(0).choices(range(97), k=11)
    models = [
        load_model(tmp_path / "out", config, torch.float32, "cpu", KERNELS),
        load_model(source, read_config(source), torch.float32, "cpu", KERNELS, scheme),
    ]
    models[1].output = models[0].output  # which a checkpoint leaves as it is
    results = [PagedRun(model, [tokens], 4, torch.float32).finish(0)[0] for model in models]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_compressed_tensors_reads_the_same_numbers(tmp_path: Path, scheme: str) -> None:
    """Of every matrix in the file, through the library's own description of it and its own decompressor."""
    base = pytest.importorskip("compressed_tensors.compressors.base", reason="compressed-tensors is not installed")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    source = make_checkpoint(
        tmp_path / "source", "llama", 0, torch.bfloat16, hidden_size=64, intermediate_size=96, rope_scaling=None
    )
    quantize_checkpoint(source, tmp_path / "out", scheme)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    config = quantization.QuantizationConfig.model_validate(fields["quantization_config"])
    (group,) = config.config_groups.values()
    compressor = base.BaseCompressor.get_value_from_registry(config.format)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    names = [key.removesuffix(".weight_scale") for key in after if key.endswith(".weight_scale")]
    assert sum(name.startswith("model.layers.0.") for name in names) == 7
    for name in names:
        parts = {key.removeprefix(f"{name}."): value for key, value in after.items() if key.startswith(f"{name}.")}
        read = compressor.decompress(parts, group)["weight"]
        expected = SCHEMES[scheme](before.pop(f"{name}.weight")).dequantize(read.dtype)
        assert torch.equal(read, expected), name
    assert before and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    options = {"hidden_size": 64, "intermediate_size": 96, "rope_scaling": None}
    source = make_checkpoint(tmp_path / "source", "qwen3", 0, **options)
    with pytest.raises(InvalidCheckpointError, match="source exists; choose another place"):
        quantize_checkpoint(source, source, "int8")
    quantize_checkpoint(source, tmp_path / "out", "int8")
    with pytest.raises(UnsupportedModelError, match=r"quantised already \(compressed-tensors\)"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", "int4")
