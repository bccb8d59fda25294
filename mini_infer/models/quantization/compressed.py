"""compressed-tensors, which llm-compressor writes: integers packed into words, plain int8, or 8-bit floats.

https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.kernels import QuantizedMatrix
from mini_infer.models.checkpoint import Stored
from mini_infer.models.linear import Format, TensorSpec, bias_spec
from mini_infer.models.matrices import Ordered, in_groups, scattered
from mini_infer.models.quantization.rules import FLOATS16_32, INTEGERS, choose, group_size, matches, names
from mini_infer.models.quantization.schemes import SIGNED
from mini_infer.parallel.slices import Span

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class CompressedRules:
    """Groups of targets, each with the format of its matrices; the first group that means a matrix holds."""

    groups: tuple[tuple[tuple[str, ...], "Scheme"], ...]
    ignore: tuple[str, ...]

    def format(self, matrix: str, stored: Mapping[str, Stored]) -> Format | None:
        kind = "Embedding" if matrix.endswith("embed_tokens") else "Linear"
        if any(matches(pattern, matrix) for pattern in self.ignore):
            return None
        for targets, scheme in self.groups:
            if any(target == kind or matches(target, matrix) for target in targets):
                return scheme.format(matrix, stored)
        return None


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group are quantised.

    Attributes:
        packed: codes are packed into words of 32 bits.
        bits: of a code.
        floating: codes are e4m3.
        symmetric: there are no zero points.
        strategy: what shares a scale: tensor, channel, group or block.
        group: inputs of a group; None is all.
        block: outputs and inputs of a block.
    """

    packed: bool
    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None

    def format(self, matrix: str, stored: Mapping[str, Stored]) -> Format:
        scale = stored.get(f"{matrix}.weight_scale")
        shape = None if scale is None else scale.shape
        return Packed(self, f"{matrix}.weight_g_idx" in stored) if self.packed else Plain(self, shape)

    def scale_shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that scales may have."""
        if self.strategy == "tensor":
            return ((1,), (), (1, 1))
        if self.strategy == "block" and self.block is not None:
            return ((-(-outputs // self.block[0]), -(-inputs // self.block[1])),)
        if self.strategy == "group" and self.group is not None:
            return ((outputs, -(-inputs // self.group)),)
        return ((outputs, 1), (outputs,))

    def scales(self, name: str, shape: tuple[int, ...], dtypes: frozenset[str], optional: bool = False) -> TensorSpec:
        """Scales or zero points of such a shape, and what shares one."""
        outputs = None if self.strategy == "tensor" else 0
        inputs = 1 if self.strategy in ("group", "block") else None
        return TensorSpec(name, shape, outputs, inputs, dtypes, optional, self.block or (1, self.group or 1))

    def expanded(self, scales: Tensor, outputs: int, inputs: int) -> tuple[Tensor, int]:
        """Scales as a `QuantizedMatrix` has them, and the size of its groups."""
        if self.strategy == "block" and self.block is not None:
            return scales.repeat_interleave(self.block[0], dim=0)[:outputs], self.block[1]
        if self.strategy == "tensor":
            return scales.reshape(1, 1).expand(outputs, 1).contiguous(), inputs
        return scales.reshape(outputs, -1), self.group or inputs


@dataclass(frozen=True)
class Packed:
    """``pack-quantized``: codes with half their range added, the first one in the lowest bits of a word.

    Attributes:
        act_order: an input may belong to any group.
    """

    scheme: Scheme
    act_order: bool

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        per_word, (scales, *_) = 32 // self.scheme.bits, self.scheme.scale_shapes(outputs, inputs)
        scale = self.scheme.scales("weight_scale", scales, FLOATS16_32)
        if self.act_order:
            scale = replace(scale, inputs=None)
        words, zeros = (outputs, -(-inputs // per_word)), (-(-outputs // per_word), scales[-1])
        zero = replace(scale, name="weight_zero_point", shape=zeros, dtypes=INTEGERS, optional=self.scheme.symmetric)
        return (
            TensorSpec("weight_packed", words, outputs=0, inputs=1, dtypes=INTEGERS, step=(1, per_word)),
            scale,
            TensorSpec("weight_shape", (2,), None, None, frozenset({"I64", "I32"})),
            replace(zero, step=(per_word, scale.step[1])),
            TensorSpec("weight_g_idx", (inputs,), None, 0, INTEGERS, optional=True),
            *_input_scales(),
            *bias_spec(outputs, bias),
        )

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> QuantizedMatrix | Ordered:
        words, bits, num_outputs, num_inputs = tensors["weight_packed"], self.scheme.bits, len(outputs), len(inputs)
        said = tensors["weight_shape"].tolist()
        if said != [outputs.total, inputs.total]:
            raise InvalidCheckpointError(
                f"weight_shape says {said[0]} x {said[1]}, but the matrix is {outputs.total} x {inputs.total}"
            )
        if bits == 4 and inputs.total % 2:
            raise UnsupportedModelError(f"4-bit codes of {inputs.total} inputs, an odd number, are not supported")
        scales, group = self.scheme.expanded(tensors["weight_scale"], num_outputs, num_inputs)
        offsets = None
        if not self.scheme.symmetric:
            zeros = _codes(tensors["weight_zero_point"].T.contiguous(), bits)[:, :num_outputs].T
            scales = scales.float()
            offsets = -scales * (zeros.float() - (128 if bits == 8 else 0))
        codes = words.contiguous().view(torch.uint8)
        if bits == 8:
            signed = (codes[:, :num_inputs] ^ 0x80).view(torch.int8)
            matrix = QuantizedMatrix(signed, scales, group, offsets)
        else:
            table = SIGNED.to(codes.device) if offsets is None else None
            matrix = QuantizedMatrix(codes[:, : num_inputs // 2].contiguous(), scales, group, offsets, table)
        if not self.act_order:
            return matrix
        return (in_groups if inputs.is_whole else scattered)(matrix, tensors["weight_g_idx"])


@dataclass(frozen=True)
class Plain:
    """``int-quantized`` and ``float-quantized``: a code is an int8 or an e4m3.

    Attributes:
        scale_shape: of the scales in the files.
    """

    scheme: Scheme
    scale_shape: tuple[int, ...] | None

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        possible = self.scheme.scale_shapes(outputs, inputs)
        shape = self.scale_shape if self.scale_shape in possible else possible[0]
        dtypes = frozenset({"F8_E4M3"} if self.scheme.floating else {"I8"})
        zero = self.scheme.scales("weight_zero_point", shape, frozenset({"I8"}), self.scheme.symmetric)
        return (
            TensorSpec("weight", (outputs, inputs), outputs=0, inputs=1, dtypes=dtypes),
            self.scheme.scales("weight_scale", shape, FLOATS16_32),
            *([] if self.scheme.floating else [zero]),
            *_input_scales(),
            *bias_spec(outputs, bias),
        )

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> QuantizedMatrix:
        weight = tensors["weight"]
        scales, group = self.scheme.expanded(tensors["weight_scale"], *weight.shape)
        if self.scheme.symmetric:
            return QuantizedMatrix(weight, scales, group)
        zeros, _ = self.scheme.expanded(tensors["weight_zero_point"], *weight.shape)
        scales = scales.float()
        return QuantizedMatrix(weight, scales, group, offsets=-scales * zeros.float())


def _input_scales() -> tuple[TensorSpec, ...]:
    """What activations were quantised with; here they keep their own dtype, or have a scale for each token."""
    scale = TensorSpec("input_scale", (1,), None, None, FLOATS16_32, optional=True)
    zero = TensorSpec("input_zero_point", (1,), None, None, frozenset({"I8"}), optional=True)
    return scale, zero


def _codes(words: Tensor, bits: int) -> Tensor:
    """The codes in each row of words, one per byte, the lowest bits first."""
    codes = words.view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def read(fields: Mapping[str, Any]) -> CompressedRules:
    """What a ``quantization_config`` of this method says."""
    if fields.get("sparsity_config") not in (None, {}) and fields["sparsity_config"].get("format") not in (
        None,
        "dense",
    ):
        raise UnsupportedModelError("quantization_config: sparsity_config is not supported")
    overall = fields.get("format", "pack-quantized")
    groups = []
    for group in fields["config_groups"].values():
        weights = group["weights"]
        if weights is None:
            continue
        format = choose({"format": group.get("format") or overall}, "format", FORMATS)
        kind = choose(weights, "type", ("int", "float"), "int")
        bits = choose(weights, "num_bits", (8,) if kind == "float" else (4, 8))
        strategy = choose(weights, "strategy", ("tensor", "channel", "group", "block"), "tensor")
        packed = format == "pack-quantized"
        if packed and (kind == "float" or strategy not in ("group", "channel")):
            raise UnsupportedModelError(
                f"quantization_config: {format} with {kind} codes by {strategy} is not supported"
            )
        if not packed and bits == 4:
            raise UnsupportedModelError(f"quantization_config: {format} with 4 bits is not supported")
        block = weights.get("block_structure")
        if strategy == "block" and not (isinstance(block, list | tuple) and len(block) == 2):
            raise InvalidCheckpointError(
                f"quantization_config: block_structure must be two sizes; got {str(block)[:80]}"
            )
        size = group_size(weights.get("group_size")) if strategy == "group" else None
        scheme = Scheme(
            packed=packed,
            bits=bits,
            floating=kind == "float",
            symmetric=bool(weights.get("symmetric", True)),
            strategy=strategy,
            group=size,
            block=(int(block[0]), int(block[1])) if strategy == "block" else None,
        )
        groups.append((names(group["targets"]), scheme))
    return CompressedRules(tuple(groups), names(fields.get("ignore")))
