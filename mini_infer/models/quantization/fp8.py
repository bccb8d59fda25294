"""8-bit floating point: e4m3 with a scale for the whole matrix, for each output, or for blocks of 128 x 128.

DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, https://arxiv.org/abs/2412.19437

``weight_scale_inv`` is what a code is multiplied by, despite its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError
from mini_infer.kernels import QuantizedMatrix
from mini_infer.models.checkpoint import Stored
from mini_infer.models.linear import Format, TensorSpec, bias_spec
from mini_infer.models.quantization.rules import FLOATS16_32, choose, contains, names
from mini_infer.parallel.slices import Span

_SCALES = FLOATS16_32 | {"F8_E8M0"}


@dataclass(frozen=True)
class Fp8:
    """A `Format`.

    Attributes:
        block: outputs and inputs that share a scale; None is one for the matrix or each output.
        scale_shape: of the scales in the files.
    """

    block: tuple[int, int] | None
    scale_shape: tuple[int, ...] | None

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (outputs,), (outputs, 1))
        if self.block is not None:
            shapes = ((-(-outputs // self.block[0]), -(-inputs // self.block[1])),)
        shape = self.scale_shape if self.scale_shape in shapes else shapes[0]
        name = "weight_scale" if self.block is None else "weight_scale_inv"
        per_output = 0 if self.block is not None or shape[:1] == (outputs,) else None
        per_input = None if self.block is None else 1
        return (
            TensorSpec("weight", (outputs, inputs), outputs=0, inputs=1, dtypes=frozenset({"F8_E4M3"})),
            TensorSpec(name, shape, per_output, per_input, _SCALES, step=self.block or (1, 1)),
            TensorSpec("input_scale", (), None, None, FLOATS16_32, optional=True),
            *bias_spec(outputs, bias),
        )

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> QuantizedMatrix:
        weight = tensors["weight"]
        if self.block is None:
            scales = tensors["weight_scale"].float().reshape(-1, 1).expand(len(outputs), 1).contiguous()
            return QuantizedMatrix(weight, scales, len(inputs))
        scales = tensors["weight_scale_inv"].float().repeat_interleave(self.block[0], dim=0)[: len(outputs)]
        return QuantizedMatrix(weight, scales.contiguous(), self.block[1])


@dataclass(frozen=True)
class Fp8Rules:
    """Whatever has scales is quantised, but for what is named in ``plain``."""

    block: tuple[int, int] | None
    plain: tuple[str, ...]

    def format(self, matrix: str, stored: Mapping[str, Stored]) -> Format | None:
        scale = stored.get(f"{matrix}.{'weight_scale' if self.block is None else 'weight_scale_inv'}")
        if scale is None or any(contains(part, matrix) for part in self.plain):
            return None
        return Fp8(self.block, scale.shape)


def read(fields: Mapping[str, Any]) -> Fp8Rules:
    """What a ``quantization_config`` of this method says."""
    choose(fields, "fmt", ("e4m3", None), None)
    choose(fields, "activation_scheme", ("dynamic", "static"), "dynamic")
    block = fields.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise InvalidCheckpointError(
            f"quantization_config: weight_block_size must be two sizes; got {str(block)[:80]!r}"
        )
    plain = (*names(fields.get("modules_to_not_convert")), *names(fields.get("ignored_layers")))
    return Fp8Rules(None if block is None else (block[0], block[1]), plain)
