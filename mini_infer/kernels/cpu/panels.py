"""How a quantised weight is kept, and how its rows are read.

The codes stay as small as they are, in panels as those of `linear`: four bytes of a row, then the same of the next row.

    codes [N, bytes of K]             packed [N / 64, bytes / 4, 64, 4], and scales [N / 64, steps, 64]
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from mini_infer.kernels import large_memory
from mini_infer.kernels.cpu import integer_tile as integers
from mini_infer.kernels.cpu.jit import ELEMENTS, FIRST, Kernel, buffer, kernel, pointer, store, tasks
from mini_infer.kernels.cpu.linear import _pack
from mini_infer.kernels.cpu.tile import COLUMNS
from mini_infer.kernels.quantized import ROTATED, QuantizedMatrix

STEP = 32
"""The most neighbouring inputs that are multiplied before they are scaled."""

_WORD, _NUMBER = ir.IntType(32), ir.FloatType()


@dataclass(frozen=True)
class Panels:
    """A matrix, rearranged.

    Attributes:
        codes: int32 `[panels, words, COLUMNS]`, four bytes each.
        scales: `[panels, steps, COLUMNS]`, float16 or float32; or `[panels, 1, COLUMNS]`, where all steps share them.
        offsets: the same, or None.
        step: how many inputs are multiplied before they are scaled.
        steps: of a row; the last may be padded.
        of: the dtype of the matrix's codes.
        table, rotated, shape: as the matrix has them.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    step: int
    steps: int
    of: torch.dtype
    table: Tensor | None
    rotated: bool
    shape: tuple[int, int]

    @classmethod
    def of_matrix(cls, matrix: QuantizedMatrix, *, half: bool) -> "Panels":
        """`half`: scales that float16 can hold to within a 2000th may be rounded to it."""
        outputs, inputs = matrix.shape
        whole_row = matrix.group >= inputs
        group = STEP if whole_row else matrix.group
        step = max(size for size in range(8, STEP + 1, 8) if group % size == 0)
        steps = -(-inputs // step)
        codes = matrix.codes.view(torch.int8)
        missing = steps * step * codes.shape[1] // inputs - codes.shape[1]
        codes = pad(codes, (0, missing)) if missing else codes.contiguous()
        num_panels, words = -(-outputs // COLUMNS), codes.shape[1] // 4
        packed = large_memory.empty((num_panels, words, COLUMNS), torch.int32)
        _pack(num_panels, codes.data_ptr(), packed.data_ptr(), outputs, words, work=packed.numel())
        numbers = [matrix.scales] if matrix.offsets is None else [matrix.scales, matrix.offsets]
        as_half = half and integers.HALF and all(_fits_half(some) for some in numbers)

        def spread(some: Tensor) -> Tensor:
            some = some.repeat_interleave(group // step, dim=1)[:, :steps] if group != step else some
            some = pad(some, (0, 0, 0, num_panels * COLUMNS - outputs))
            some = some.view(num_panels, COLUMNS, -1).transpose(1, 2)
            return some.to(torch.float16 if as_half else torch.float32).contiguous()

        offsets = None if matrix.offsets is None else spread(matrix.offsets)
        return cls(
            packed, spread(matrix.scales), offsets, step, steps, matrix.codes.dtype, matrix.table, matrix.rotated,
            matrix.shape,
        )  # fmt: skip

    def addresses(self, table: Tensor, bias: Tensor | None) -> tuple[int, ...]:
        """Where codes, scales, offsets, a table and a bias lie; 0 for offsets and a bias that are not there."""
        tensors = self.codes, self.scales, self.offsets, table, bias
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _fits_half(numbers: Tensor) -> bool:
    wide = numbers.float()
    return bool(((wide.half().float() - wide).abs() <= 2**-11 * wide.abs()).all())


class Rows:
    """Rows of the weight, as values: number r is column r % COLUMNS of panel r // COLUMNS."""

    def __init__(self, panels: Panels, dtype: torch.dtype) -> None:
        self._panels, self._dtype = panels, dtype
        self._table = torch.empty(0) if panels.table is None else panels.table.contiguous()
        scale = np.uint16 if panels.scales.dtype is torch.float16 else np.float32
        has_table, has_offsets = panels.table is not None, panels.offsets is not None
        self._kernel = _rows_kernel(panels.of, scale, has_table, has_offsets, panels.rotated, ELEMENTS[dtype])
        self._fixed = (
            panels.codes.data_ptr(),
            panels.scales.data_ptr(),
            0 if panels.offsets is None else panels.offsets.data_ptr(),
            self._table.data_ptr(),
            panels.shape[1],
            panels.step,
            panels.codes.shape[1],
            panels.scales.shape[1],
        )

    def __call__(self, ids: Tensor) -> Tensor:
        ids, inputs = ids.to(torch.int64).contiguous(), self._panels.shape[1]
        out = torch.empty((len(ids), inputs), dtype=self._dtype)
        self._kernel(len(ids), ids.data_ptr(), out.data_ptr(), *self._fixed, work=out.numel())
        return out


@functools.cache
def _rows_kernel(
    of: torch.dtype, scale: type, has_table: bool, has_offsets: bool, rotates: bool, element: type
) -> Kernel:
    name = str(of)
    in_word = 8 if of is torch.uint8 else 4

    @kernel
    def rows(args):
        ids, out = pointer(args[FIRST], np.int64), pointer(args[FIRST + 1], element)
        codes, scales = pointer(args[FIRST + 2], np.int32), pointer(args[FIRST + 3], scale)
        offsets, table = pointer(args[FIRST + 4], scale), pointer(args[FIRST + 5], np.float32)
        num_inputs, step, num_words, num_scales = args[FIRST + 6], args[FIRST + 7], args[FIRST + 8], args[FIRST + 9]
        turned_at = buffer(ROTATED)
        turned = pointer(turned_at, np.float32)
        for row in tasks(args):
            panel, column = ids[row] // COLUMNS, ids[row] % COLUMNS
            for k in range(num_inputs):
                number = code(name, codes[(panel * num_words + k // in_word) * COLUMNS + column], k % in_word)
                decoded = table[np.int64(number)] if has_table else number
                side = (panel * num_scales + min(k // step, num_scales - 1)) * COLUMNS + column
                value = decoded * _scale(scales, side)
                if has_offsets:
                    value = _finished(value) + _scale(offsets, side)
                if rotates:
                    turned[k % ROTATED] = value
                    if k % ROTATED == ROTATED - 1:
                        rotate_in_place(turned_at)
                        for i in range(ROTATED):
                            store(out, row * num_inputs + k + 1 - ROTATED + i, turned[i])
                else:
                    store(out, row * num_inputs + k, value)

    return rows


@intrinsic
def rotate_in_place(typing_context, address):
    """Rotate 32 float32 where they are, as `kernels.quantized` does: five times sums and differences of pairs."""

    def codegen(context, builder, signature, args):
        vector, places = ir.VectorType(_NUMBER, ROTATED), range(ROTATED)
        place = builder.inttoptr(args[0], vector.as_pointer())
        root = ir.Constant(vector, [ROTATED**-0.5] * ROTATED)
        values = builder.fmul(builder.load(place, align=4), root)
        for distance in (1, 2, 4, 8, 16):
            order = ir.Constant(ir.VectorType(_WORD, ROTATED), [i ^ distance for i in places])
            others = builder.shuffle_vector(values, values, order)
            signs = ir.Constant(vector, [-1.0 if i & distance else 1.0 for i in places])
            values = builder.fadd(others, builder.fmul(values, signs))
        builder.store(values, place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _scale(typing_context, numbers, index):
    """A float32, or a float16 of which only the bits are known, as a float32."""

    def codegen(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        if signature.args[0].dtype == types.float32:
            return value
        return builder.fpext(builder.bitcast(value, ir.HalfType()), _NUMBER)

    return types.float32(numbers, types.int64), codegen


@intrinsic
def _finished(typing_context, value):
    """The same number, rounded: what is added to it is not made one operation with what it came from."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], _WORD)
        kept = builder.asm(ir.FunctionType(_WORD, [_WORD]), "", "=r,0", [bits], False)
        return builder.bitcast(kept, _NUMBER)

    return types.float32(types.float32), codegen


@intrinsic(prefer_literal=True)
def code(typing_context, of, word, place):
    """The number in a place of a word: of four int8 or float8_e4m3fn, or of eight codes from 0 to 15.

    The bits of a float8, shifted to where a float32 has its exponent and fraction, say a number that is 2^120 times too
    small, also where the exponent is 0. The largest code is NaN.
    """
    if not isinstance(of, types.Literal):
        return None

    def codegen(context, builder, signature, args):
        def constant(value: int) -> ir.Constant:
            return ir.Constant(_WORD, value)

        word, place = args[1], builder.trunc(args[2], _WORD)
        if of.literal_value == "torch.uint8":
            shifted = builder.lshr(word, builder.mul(place, constant(4)))
            return builder.sitofp(builder.and_(shifted, constant(15)), _NUMBER)
        shifted = builder.lshr(word, builder.mul(place, constant(8)))
        if of.literal_value == "torch.int8":
            return builder.sitofp(builder.ashr(builder.shl(shifted, constant(24)), constant(24)), _NUMBER)
        size, sign = builder.and_(shifted, constant(0x7F)), builder.and_(shifted, constant(0x80))
        small = builder.bitcast(builder.shl(size, constant(20)), _NUMBER)
        bits = builder.bitcast(builder.fmul(small, ir.Constant(_NUMBER, 2.0**120)), _WORD)
        bits = builder.select(builder.icmp_unsigned("==", size, constant(0x7F)), constant(0x7FC00000), bits)
        return builder.bitcast(builder.or_(bits, builder.shl(sign, constant(24))), _NUMBER)

    return types.float32(of, types.int32, types.int64), codegen
