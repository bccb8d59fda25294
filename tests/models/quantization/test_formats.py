"""Every format: a matrix is what its own library makes of it, and a checkpoint of them the model of those numbers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_infer import kernels
from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models import load_model, read_config
from mini_infer.models.checkpoint import Stored
from mini_infer.models.quantization import read_quantization
from mini_infer.parallel.slices import whole

from ..checkpoints import make_checkpoint
from ..test_decoder import PagedRun, reference_model
from .writers import FORMATS, Write, awq, compressed, fp8, gptq

KERNELS = kernels.resolve("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SAFETENSORS = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8", torch.int32: "I32",
    torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix(name: str) -> None:
    config, write = FORMATS[name]
    quantization = read_quantization(config)
    assert quantization is not None
    draw = random.Random(name)
    for _ in range(4):
        outputs, inputs, seed = 8 * draw.randint(1, 40), 32 * draw.randint(1, 9), draw.randrange(2**32)
        generator = torch.Generator().manual_seed(seed)
        dtype = draw.choice((torch.bfloat16, torch.float16))
        tensors, expected = write(torch.randn(outputs, inputs, generator=generator).to(dtype) * 0.1, generator)
        where = Path("m.safetensors")
        stored = {
            f"m.{part}": Stored(f"m.{part}", where, tuple(tensor.shape), SAFETENSORS[tensor.dtype])
            for part, tensor in tensors.items()
        }
        format = quantization.format("m", stored)
        for spec in format.tensors(outputs, inputs, bias=False):
            there = stored.get(f"m.{spec.name}")
            assert there is not None or spec.optional, spec
            assert there is None or (there.shape == spec.shape and there.dtype in spec.dtypes), (spec, there)
        matrix = format.matrix(tensors, whole(outputs), whole(inputs))
        assert not isinstance(matrix, torch.Tensor)
        read = matrix.dequantize(expected.dtype)
        torch.testing.assert_close(read, expected, rtol=0, atol=0, msg=f"{name} {outputs=} {inputs=} {seed=}")


def quantized_checkpoint(
    tmp_path: Path, config: dict[str, Any], write: Write, plain: tuple[str, ...] = (), **overrides: Any
) -> tuple[Path, Path]:
    """A checkpoint whose matrices, but those in ``plain``, are quantised, and one with the numbers that they are."""
    path = make_checkpoint(tmp_path / "quantized", "qwen3", 3, **{**SHAPE, "rope_scaling": None, **overrides})
    other = make_checkpoint(tmp_path / "plain", "qwen3", 3, **{**SHAPE, "rope_scaling": None, **overrides})
    quantize_in_place(path, config, write, plain, other)
    return path, other


def quantize_in_place(
    path: Path, config: dict[str, Any], write: Write, plain: tuple[str, ...] = (), other: Path | None = None
) -> None:
    """Quantise a checkpoint's matrices, and write the numbers that they are to another one."""
    generator = torch.Generator().manual_seed(0)
    weights, numbers = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        matrix = name.removesuffix(".weight")
        if tensor.ndim < 2 or "embed" in name or "lm_head" in name or any(part in name for part in plain):
            weights[name] = numbers[name] = tensor
            continue
        tensors, read = write(tensor * 0.1, generator)
        weights |= {f"{matrix}.{part}": value.contiguous() for part, value in tensors.items()}
        numbers[name] = read.to(tensor.dtype).contiguous()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    if other is not None:
        save_file(numbers, other / "model.safetensors", {"format": "pt"})
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))


def logits(path: Path, tokens: list[int]) -> torch.Tensor:
    model = load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
    with torch.inference_mode():
        (result,) = PagedRun(model, [tokens], 4, torch.float32).finish(0)
    return result


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint(tmp_path: Path, name: str) -> None:
    path, other = quantized_checkpoint(tmp_path, *FORMATS[name], num_hidden_layers=2, sliding_window=None)
    tokens = random.Random(name).choices(range(97), k=19)
    with torch.inference_mode():
        expected = reference_model(other, torch.float32)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits(path, tokens), expected, rtol=1e-4, atol=1e-4)


IGNORING = {
    "compressed-tensors": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="channel"),
        "ignore",
        "re:.*down.*",
    ),
    "awq": (awq(32), "modules_to_not_convert", "down_proj"),
    "fp8": (fp8(block=True), "modules_to_not_convert", "down_proj"),
    "gptq": (gptq("gptq", 4, 32, False, True), "dynamic", {"-:.*down": {}}),
}


@pytest.mark.parametrize("method", IGNORING)
def test_matrices_that_stay_as_they_are(tmp_path: Path, method: str) -> None:
    (config, write), field, value = IGNORING[method]
    config = {**config, field: value if isinstance(value, dict) else [value]}
    path, other = quantized_checkpoint(tmp_path, config, write, plain=("down_proj", "v_proj"))
    tokens = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        expected = reference_model(other, torch.float32)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits(path, tokens), expected, rtol=1e-4, atol=1e-4)


REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes', which is not supported"),
    ({"bits": 4}, "quant_method 'None'"),
    ({"quant_method": "gptq", "bits": 3}, "bits may be 4, 8; got '3'"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format may be gptq, gptq_v2"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version may be gemm, GEMM; got 'gemv'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt may be e4m3"),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}},
        },
        "format may be pack-quantized, .*; got 'nvfp4-pack-quantized'",
    ),
]


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_what_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        read_quantization(config)


MALFORMED = [
    {"quant_method": "compressed-tensors"},
    {"quant_method": "compressed-tensors", "config_groups": []},
    {"quant_method": "compressed-tensors", "config_groups": {"a": 5}},
    {"quant_method": "gptq", "bits": 4, "group_size": "128"},
    {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": 5}},
    {"quant_method": "awq", "bits": 4, "modules_to_not_convert": 7},
    {"quant_method": "fp8", "weight_block_size": [128, 0]},
]


@pytest.mark.parametrize("config", MALFORMED, ids=str)
def test_what_makes_no_sense(config: dict[str, Any]) -> None:
    with pytest.raises((InvalidCheckpointError, UnsupportedModelError), match="quantization_config"):
        read_quantization(config)


def test_inputs_in_an_order_that_is_none(tmp_path: Path) -> None:
    config, write = gptq("gptq", 4, 32, act_order=True, symmetric=True)
    path, _ = quantized_checkpoint(tmp_path, config, write)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if name.endswith("g_idx"):
            weights[name][:] = 1
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpointError, match="g_idx does not put 64 inputs into groups of 32"):
        logits(path, [1])
