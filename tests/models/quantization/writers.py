"""Matrices in the formats of the Hub, and the numbers that they stand for: by compressed-tensors' own code, or written
out from the formats' definitions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
Write = Callable[[Tensor, torch.Generator], Written]


def compressed(format: str, **weights: Any) -> tuple[dict[str, Any], Write]:
    """A ``quantization_config`` of compressed-tensors, and what writes a matrix accordingly."""
    group = {"targets": ["Linear"], "weights": weights, "format": format}
    scheme = QuantizationScheme(**group)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format, ignore=["lm_head"]).model_dump(
        mode="json"
    )
    compressor = BaseCompressor.get_value_from_registry(format)
    symmetric, strategy = weights.get("symmetric", True), weights["strategy"]

    def write(weight: Tensor, generator: torch.Generator) -> Written:
        outputs, inputs = weight.shape
        size = weights.get("group_size") or inputs
        shape = {
            "tensor": (1,),
            "channel": (outputs, 1),
            "group": (outputs, inputs // size),
            "block": (-(-outputs // 128), -(-inputs // 128)),
        }[strategy]
        scale = (0.5 + torch.rand(shape, generator=generator)).to(weight.dtype) * 0.01
        zero = torch.zeros(shape, dtype=torch.int8)
        if not symmetric:
            zero = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
        state = {"weight": weight, "weight_scale": scale}
        if weights["type"] == "int":
            state["weight_zero_point"] = zero
        written = compressor.compress(state, scheme)
        read = compressor.decompress(dict(written), scheme)
        return dict(written), read["weight"]

    return config, write


def packed_in_order() -> tuple[dict[str, Any], Write]:
    """``pack-quantized`` of older files, with a group for each input: the library reads them no more."""
    config, _ = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)

    def write(weight: Tensor, generator: torch.Generator) -> Written:
        outputs, inputs = weight.shape
        index = (torch.arange(inputs) // 32)[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        codes = torch.randint(-8, 8, (outputs, inputs), generator=generator)
        scales = torch.rand((outputs, inputs // 32), generator=generator).half() * 0.01
        tensors = {
            "weight_packed": words(codes + 8, 4),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
            "weight_g_idx": index.int(),
        }
        return tensors, codes.double() * scales.double()[:, index]

    return config, write


def gptq(version: str, bits: int, group: int, act_order: bool, symmetric: bool) -> tuple[dict[str, Any], Write]:
    """GPTQ: w[n, k] = (q[k, n] - z[g[k], n]) * s[g[k], n], all packed from the lowest bits on."""
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": version,
    }

    def write(weight: Tensor, generator: torch.Generator) -> Written:
        outputs, inputs = weight.shape
        size = inputs if group == -1 else group
        index = torch.arange(inputs) // size
        if act_order:  # the same for all matrices that read the same x, as when one model is quantised
            index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        groups = -(-inputs // size)
        codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=generator)
        zeros = torch.full((groups, outputs), 1 << (bits - 1))
        if not symmetric:
            zeros = torch.randint(1, 1 << bits, (groups, outputs), generator=generator)
        scales = (torch.rand((groups, outputs), generator=generator) * 0.01).half()
        read = ((codes - zeros[index]).double() * scales[index].double()).T
        stored = zeros - 1 if version == "gptq" else zeros
        tensors = {
            "qweight": words(codes.T, bits).T,
            "qzeros": words(stored, bits),
            "scales": scales,
            "g_idx": index.int(),
        }
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, read

    return config, write


def awq(group: int) -> tuple[dict[str, Any], Write]:
    """AWQ: as GPTQ, but a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7, and zero points are what they are."""
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}

    def write(weight: Tensor, generator: torch.Generator) -> Written:
        outputs, inputs = weight.shape
        codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
        scales = (torch.rand((inputs // group, outputs), generator=generator) * 0.01).half()
        index = torch.arange(inputs) // group
        read = ((codes - zeros[index]).double() * scales[index].double()).T

        def mixed(numbers: Tensor) -> Tensor:
            return words(numbers.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

        return {"qweight": mixed(codes), "qzeros": mixed(zeros), "scales": scales}, read

    return config, write


def fp8(block: bool, per_output: bool = False) -> tuple[dict[str, Any], Write]:
    """e4m3 codes times a scale for the matrix, each output, or each block of 128 x 128."""
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if block:
        config["weight_block_size"] = [128, 128]

    def write(weight: Tensor, generator: torch.Generator) -> Written:
        outputs, inputs = weight.shape
        codes = (torch.randn(weight.shape, generator=generator) * 50).to(torch.float8_e4m3fn)
        shape = (-(-outputs // 128), -(-inputs // 128)) if block else (outputs, 1) if per_output else ()
        scales = torch.rand(shape, generator=generator) * 1e-3
        each = scales
        if block:
            each = scales.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1)[:, :inputs]
        name = "weight_scale_inv" if block else "weight_scale"
        return {"weight": codes, name: scales}, codes.double() * each.double()

    return config, write


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes in words of 32 bits."""
    grouped = codes.to(torch.int64).unflatten(1, (-1, 32 // bits))
    shifted = grouped << torch.arange(0, 32, bits)
    return shifted.sum(-1).to(torch.uint32).view(torch.int32)


FORMATS: Mapping[str, tuple[dict[str, Any], Write]] = {
    "packed-4-group": compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "packed-4-channel": compressed("pack-quantized", num_bits=4, type="int", strategy="channel"),
    "packed-8-group": compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32),
    "packed-4-asymmetric": compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "packed-8-asymmetric": compressed(
        "pack-quantized", num_bits=8, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "packed-4-act-order": packed_in_order(),
    "int-channel": compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "int-tensor": compressed("int-quantized", num_bits=8, type="int", strategy="tensor"),
    "int-asymmetric": compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
    "float-tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "float-channel": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float-block": compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]
    ),
    "gptq": gptq("gptq", 4, 32, act_order=False, symmetric=True),
    "gptq-asymmetric": gptq("gptq", 4, 32, act_order=False, symmetric=False),
    "gptq-v2-act-order": gptq("gptq_v2", 4, 32, act_order=True, symmetric=False),
    "gptq-act-order": gptq("gptq", 4, 32, act_order=True, symmetric=True),
    "gptq-8": gptq("gptq", 8, 32, act_order=False, symmetric=True),
    "gptq-8-asymmetric": gptq("gptq", 8, -1, act_order=False, symmetric=False),
    "awq": awq(32),
    "fp8-tensor": fp8(block=False),
    "fp8-channel": fp8(block=False, per_output=True),
    "fp8-block": fp8(block=True),
}
