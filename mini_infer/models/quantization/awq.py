"""AWQ's files, in the layout that is called gemm: words of eight outputs, in an order that suited one GPU kernel.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023,
https://arxiv.org/abs/2306.00978
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mini_infer.kernels import QuantizedMatrix
from mini_infer.models.checkpoint import Stored
from mini_infer.models.linear import Format, TensorSpec, bias_spec
from mini_infer.models.quantization.gptq import coded, words_to_codes
from mini_infer.models.quantization.rules import FLOATS16_32, INTEGERS, choose, contains, group_size, names
from mini_infer.parallel.slices import Span

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where the codes of outputs 0 to 7 are in a word."""


@dataclass(frozen=True)
class Awq:
    """A `Format`, of 4 bits; ``group`` inputs share a scale and a zero point, or all."""

    group: int | None

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        groups, per_group = -(-inputs // (self.group or inputs)), None if self.group is None else 0
        group, words = self.group or 1, -(-outputs // 8)
        return (
            TensorSpec("qweight", (inputs, words), outputs=1, inputs=0, dtypes=INTEGERS, step=(8, 1)),
            TensorSpec("qzeros", (groups, words), outputs=1, inputs=per_group, dtypes=INTEGERS, step=(8, group)),
            TensorSpec("scales", (groups, outputs), outputs=1, inputs=per_group, dtypes=FLOATS16_32, step=(1, group)),
            *bias_spec(outputs, bias),
        )

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> QuantizedMatrix:
        codes, zeros = _codes(tensors["qweight"]), _codes(tensors["qzeros"])
        return coded(codes, zeros, tensors["scales"].T.contiguous(), 4, self.group or len(inputs))


def _codes(words: Tensor) -> Tensor:
    """``[inputs, outputs / 8]`` words as ``[outputs, inputs]`` codes, one per byte."""
    codes: Tensor = words_to_codes(words, 4).unflatten(1, (-1, 8))[..., _PLACES]
    return codes.flatten(1).T.contiguous()


@dataclass(frozen=True)
class AwqRules:
    """Whatever has ``qweight`` is quantised, but for what is named in ``plain``."""

    awq: Awq
    plain: tuple[str, ...]

    def format(self, matrix: str, stored: Mapping[str, Stored]) -> Format | None:
        if any(contains(part, matrix) for part in self.plain) or f"{matrix}.qweight" not in stored:
            return None
        return self.awq


def read(fields: Mapping[str, Any]) -> AwqRules:
    """What a ``quantization_config`` of this method says."""
    choose(fields, "version", ("gemm", "GEMM"), "gemm")
    choose(fields, "bits", (4,))
    return AwqRules(Awq(group_size(fields.get("group_size", 128))), names(fields.get("modules_to_not_convert")))
