"""GPTQ's files: codes and zero points packed into words along the inputs and along the outputs.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
https://arxiv.org/abs/2210.17323

With "act order" the inputs were quantised in the order of their importance, and a table says to which group each
belongs. Then the matrix is kept with its inputs in the order of the groups.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.kernels import QuantizedMatrix
from mini_infer.models.checkpoint import Stored
from mini_infer.models.linear import Format, TensorSpec, bias_spec
from mini_infer.models.matrices import Ordered, in_groups, packed, scattered
from mini_infer.models.quantization.rules import FLOATS16_32, INTEGERS, choose, group_size
from mini_infer.models.quantization.schemes import SIGNED
from mini_infer.parallel.slices import Span


@dataclass(frozen=True)
class Gptq:
    """A `Format`.

    Attributes:
        bits: of a code, 4 or 8.
        group: inputs of a group; None is all.
        zeros_less_one: zero points are stored as one less, as in the first version.
        act_order: an input may belong to any group.
    """

    bits: int
    group: int | None
    zeros_less_one: bool
    act_order: bool

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        per_word, groups = 32 // self.bits, -(-inputs // (self.group or inputs))
        group, per_group = self.group or 1, None if self.group is None or self.act_order else 0
        codes, zeros = (-(-inputs // per_word), outputs), (groups, -(-outputs // per_word))
        return (
            TensorSpec("qweight", codes, outputs=1, inputs=0, dtypes=INTEGERS, step=(1, per_word)),
            TensorSpec("qzeros", zeros, outputs=1, inputs=per_group, dtypes=INTEGERS, step=(per_word, group)),
            TensorSpec("scales", (groups, outputs), outputs=1, inputs=per_group, dtypes=FLOATS16_32, step=(1, group)),
            TensorSpec("g_idx", (inputs,), outputs=None, inputs=0, dtypes=INTEGERS, optional=True),
            *bias_spec(outputs, bias),
        )

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> QuantizedMatrix | Ordered:
        codes = words_to_codes(tensors["qweight"].T, self.bits)[:, : len(inputs)]
        zeros = words_to_codes(tensors["qzeros"], self.bits)[:, : len(outputs)].T + int(self.zeros_less_one)
        group, index = self.group or len(inputs), tensors.get("g_idx")
        matrix = coded(codes, zeros, tensors["scales"].T.contiguous(), self.bits, group)
        if index is None:
            return matrix
        if self.act_order and not inputs.is_whole:
            return scattered(matrix, index)
        return in_groups(matrix, index - (inputs.start // self.group if self.group else 0))


@dataclass(frozen=True)
class GptqRules:
    """Whatever has ``qweight`` is quantised.

    Attributes:
        gptq: how.
        exceptions: patterns of names, and how those are; None is not at all.
    """

    gptq: Gptq
    exceptions: tuple[tuple[re.Pattern[str], Gptq | None], ...] = ()

    def format(self, matrix: str, stored: Mapping[str, Stored]) -> Format | None:
        for pattern, gptq in self.exceptions:
            if pattern.match(matrix):
                return gptq
        return self.gptq if f"{matrix}.qweight" in stored else None


def words_to_codes(words: Tensor, bits: int) -> Tensor:
    """The codes in each row of words, one per byte, the lowest bits first: ``[N, words * 32 / bits]``."""
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def coded(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, group: int) -> QuantizedMatrix:
    """``(code - zero) * scale`` for codes and zeros without a sign, ``[outputs, inputs]`` and ``[outputs, groups]``."""
    middle = 1 << (bits - 1)
    if bits == 4 and codes.shape[1] % 2:
        raise UnsupportedModelError(f"4-bit codes of {codes.shape[1]} inputs, an odd number, are not supported")
    symmetric = bool((zeros == middle).all())
    if bits == 8:
        signed = (codes ^ 0x80).view(torch.int8)
        if symmetric:
            return QuantizedMatrix(signed, scales, group)
        return QuantizedMatrix(signed, scales.float(), group, offsets=scales.float() * (middle - zeros.float()))
    if symmetric:
        return QuantizedMatrix(packed(codes), scales, group, table=SIGNED.to(codes.device))
    return QuantizedMatrix(packed(codes), scales.float(), group, offsets=-scales.float() * zeros.float())


def read(fields: Mapping[str, Any]) -> GptqRules:
    """What a ``quantization_config`` of this method says."""
    version = choose(fields, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")

    def gptq(given: Mapping[str, Any]) -> Gptq:
        bits = choose(given, "bits", (4, 8))
        return Gptq(bits, group_size(given.get("group_size", 128)), version == "gptq", bool(given.get("desc_act")))

    exceptions = []
    for rule, changed in (fields.get("dynamic") or {}).items():
        if not isinstance(changed, Mapping):
            raise InvalidCheckpointError(f"quantization_config: dynamic must hold objects; got {str(changed)[:80]}")
        pattern = re.compile(rule[2:] if rule[:2] in ("+:", "-:") else rule)
        exceptions.append((pattern, None if rule.startswith("-:") else gptq({**fields, **changed})))
    return GptqRules(gptq(fields), tuple(exceptions))
