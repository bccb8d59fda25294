"""Several matrices as one, since what is stored apart is multiplied together; and a part of one, for a rank that has no
more of it.

Checkpoints may hold the parts of a fused projection in formats of their own; the values of what is joined or cut are
theirs, exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError
from mini_infer.kernels import QuantizedMatrix
from mini_infer.kernels.quantized import ROTATED
from mini_infer.parallel.slices import Span


@dataclass(frozen=True)
class Ordered:
    """A matrix whose inputs are in another order: its input j is input ``order[j]`` of x."""

    matrix: QuantizedMatrix
    order: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, ``[outputs, inputs]``, in x's order."""
        return self.matrix.dequantize(dtype)[:, self.order.argsort()]


Matrix: TypeAlias = Tensor | QuantizedMatrix | Ordered


def in_groups(matrix: QuantizedMatrix, index: Tensor) -> QuantizedMatrix | Ordered:
    """A matrix whose input k has the scale of group ``index[k]``, with the inputs of a group side by side.

    Raises:
        InvalidCheckpointError: the groups are not as large as they should be.
    """
    inputs = matrix.shape[1]
    order = torch.argsort(index, stable=True)
    wanted = torch.arange(inputs, device=index.device) // matrix.group
    if not torch.equal(index[order].long(), wanted):
        raise InvalidCheckpointError(f"g_idx does not put {inputs} inputs into groups of {matrix.group}")
    if torch.equal(index.long(), wanted):
        return matrix
    is_packed = matrix.codes.dtype is torch.uint8
    codes = packed(unpacked(matrix.codes)[:, order]) if is_packed else matrix.codes[:, order]
    return Ordered(replace(matrix, codes=codes), order)


def scattered(matrix: QuantizedMatrix, index: Tensor) -> QuantizedMatrix:
    """Some of the inputs of a matrix whose input k has the scale of group ``index[k]``, with the scales of all groups:
    each input with a scale of its own, since a group's inputs may be anywhere.

    Raises:
        InvalidCheckpointError: there is no such group.
    """
    index, groups = index.long(), matrix.scales.shape[1]
    if bool(((index < 0) | (index >= groups)).any()):
        raise InvalidCheckpointError(f"g_idx names a group that is none of the {groups}")
    offsets = None if matrix.offsets is None else matrix.offsets[:, index]
    return replace(matrix, scales=matrix.scales[:, index], offsets=offsets, group=1)


def join(matrices: Sequence[Matrix], dtype: torch.dtype) -> Matrix:
    """The matrices one below the other.

    If one has plain numbers, or inputs in an order or a rotation that not all share, or 8-bit floating point meets
    another kind, the result has plain numbers, in ``dtype``. Else it has codes: those of the parts where they are of
    one kind, and int8 with the smallest group's scales where not.
    """
    if len(matrices) == 1:
        return matrices[0].to(dtype) if isinstance(matrices[0], Tensor) else matrices[0]
    ordered = [matrix for matrix in matrices if isinstance(matrix, Ordered)]
    if len(ordered) == len(matrices) and all(torch.equal(m.order, ordered[0].order) for m in ordered):
        together = join([m.matrix for m in ordered], dtype)
        assert isinstance(together, QuantizedMatrix)
        return Ordered(together, ordered[0].order)
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    sorts = {(matrix.codes.dtype is torch.float8_e4m3fn, matrix.rotated) for matrix in quantized}
    if len(quantized) < len(matrices) or len(sorts) > 1:
        plain = [m.to(dtype) if isinstance(m, Tensor) else m.dequantize(dtype) for m in matrices]
        return torch.cat(plain)
    group = math.gcd(*(_group(matrix) for matrix in quantized))
    alike = [_with_group(matrix, group) for matrix in quantized]
    if len({(m.codes.dtype, None if m.table is None else tuple(m.table.tolist())) for m in alike}) > 1:
        alike = [_as_int8(matrix) for matrix in alike]
    if any(matrix.offsets is not None for matrix in alike):
        alike = [m if m.offsets is not None else replace(m, offsets=torch.zeros_like(m.scales)) for m in alike]
    scales = alike[0].scales.dtype if len({matrix.scales.dtype for matrix in alike}) == 1 else torch.float32
    return QuantizedMatrix(
        codes=torch.cat([matrix.codes for matrix in alike]),
        scales=torch.cat([matrix.scales.to(scales) for matrix in alike]),
        group=group,
        offsets=None
        if alike[0].offsets is None
        else torch.cat([m.offsets.to(scales) for m in alike if m.offsets is not None]),
        table=alike[0].table,
        rotated=alike[0].rotated,
    )


def cut(matrix: Matrix, outputs: Span, inputs: Span, dtype: torch.dtype) -> Matrix:
    """Some of the outputs of a matrix, and of its inputs.

    What is cut between inputs that share a scale gets scales for smaller groups. What would then have a scale for each
    input has plain numbers, in ``dtype``, and so has what has its inputs in another order, if it is cut between inputs,
    or what is cut between inputs that were rotated together.
    """
    if isinstance(matrix, Ordered):
        if inputs.is_whole:
            return replace(matrix, matrix=_some_outputs(matrix.matrix, outputs))
        matrix = matrix.dequantize(dtype)
    elif isinstance(matrix, QuantizedMatrix) and matrix.rotated and inputs.cover(ROTATED) != inputs:
        matrix = matrix.dequantize(dtype)
    if isinstance(matrix, Tensor):
        return matrix[outputs.start : outputs.stop, inputs.start : inputs.stop]
    matrix = _some_outputs(matrix, outputs)
    matrix = matrix if inputs.is_whole else _some_inputs(matrix, inputs)
    return matrix.dequantize(dtype) if matrix.group == 1 else matrix


def _some_outputs(matrix: QuantizedMatrix, outputs: Span) -> QuantizedMatrix:
    if outputs.is_whole:
        return matrix
    rows = slice(outputs.start, outputs.stop)
    offsets = None if matrix.offsets is None else matrix.offsets[rows].contiguous()
    return replace(matrix, codes=matrix.codes[rows], scales=matrix.scales[rows].contiguous(), offsets=offsets)


def _some_inputs(matrix: QuantizedMatrix, inputs: Span) -> QuantizedMatrix:
    ends = inputs.start, inputs.stop
    if matrix.scales.shape[1] == 1:
        group, groups = len(inputs), slice(None)
    else:
        group = math.gcd(matrix.group, *(end for end in ends if end < inputs.total))
        groups = slice(inputs.start // group, -(-inputs.stop // group))
        matrix = _with_group(matrix, group)
    if matrix.codes.dtype is torch.uint8 and any(end % 2 for end in ends):
        matrix = _as_int8(matrix)
    per_byte = 2 if matrix.codes.dtype is torch.uint8 else 1
    return replace(
        matrix,
        codes=matrix.codes[:, inputs.start // per_byte : inputs.stop // per_byte].contiguous(),
        scales=matrix.scales[:, groups].contiguous(),
        offsets=None if matrix.offsets is None else matrix.offsets[:, groups].contiguous(),
        group=group,
    )


def bytes_of(matrix: Matrix) -> int:
    """What its numbers take: codes, scales and offsets."""
    if isinstance(matrix, Tensor):
        return matrix.nbytes
    if isinstance(matrix, Ordered):
        return bytes_of(matrix.matrix)
    parts = (matrix.codes, matrix.scales, matrix.offsets)
    return sum(part.nbytes for part in parts if part is not None)


def unpacked(codes: Tensor) -> Tensor:
    """Two codes per byte as one code per byte, ``[N, inputs]``."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def packed(codes: Tensor) -> Tensor:
    """One code per byte, 0 to 15, as two codes per byte, ``[N, inputs / 2]``."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _group(matrix: QuantizedMatrix) -> int:
    """Inputs that share a scale; all, where a row has one."""
    return matrix.shape[1] if matrix.scales.shape[1] == 1 else matrix.group


def _with_group(matrix: QuantizedMatrix, group: int) -> QuantizedMatrix:
    """The same values with scales for smaller groups."""
    repeats, groups = _group(matrix) // group, -(-matrix.shape[1] // group)
    if repeats == 1:
        return replace(matrix, group=group)
    offsets = matrix.offsets
    return replace(
        matrix,
        scales=matrix.scales.repeat_interleave(repeats, dim=1)[:, :groups],
        offsets=None if offsets is None else offsets.repeat_interleave(repeats, dim=1)[:, :groups],
        group=group,
    )


def _as_int8(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same values with 8-bit codes. Every table there is holds integers, or their halves."""
    if matrix.codes.dtype is torch.int8:
        return matrix
    codes = unpacked(matrix.codes)
    if matrix.table is None:
        return replace(matrix, codes=codes.to(torch.int8))
    unit = 1.0 if bool((matrix.table == matrix.table.round()).all()) else 0.5
    whole = (matrix.table / unit).to(torch.int8)[codes.long()]
    return replace(matrix, codes=whole, scales=matrix.scales * unit, table=None)
