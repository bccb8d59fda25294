"""Matrix products with quantised weights.

    y[m, n] = Σ_k x[m, k] * value[n, k] + bias[n]

The codes stay as small as they are, in panels as those of `linear`: four bytes of a row, then the same of the next row.

    codes [N, bytes of K]             packed [N / 64, bytes / 4, 64, 4], and scales [N / 64, steps, 64]

There are two ways through them.

- *Integers*, for bfloat16 x and codes that are integers. x is rounded to 8 bits first, with a scale for every step of
  at most 32 neighbouring numbers (as llama.cpp does), and `integer_tile` multiplies. An x costs a 127th of its
  step's largest at most, which for a normal distribution is 0.6 % of the result. Where the weight is rotated, x is,
  too; then no number of a step is much larger than the others, whatever the model.
- *Values*, for float32 x, and for codes that are no integers. A step of a panel is turned into float32 in the first
  cache, and `tile` multiplies that with all tokens. Nothing is rounded.

Bytes: the codes and scales, once. Floor: those / memory bandwidth for a few tokens, 2 * M * N * K / peak for many.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from mini_infer.kernels import large_memory
from mini_infer.kernels.cpu import integer_tile as integers
from mini_infer.kernels.cpu.integer_tile import Kind, Scales, integer_tile
from mini_infer.kernels.cpu.jit import (
    ELEMENTS,
    FIRST,
    Kernel,
    buffer,
    kernel,
    load,
    nearest,
    pointer,
    store,
    tasks,
    thread_number,
)
from mini_infer.kernels.cpu.linear import RUN, TOKENS, _pack, _widened
from mini_infer.kernels.cpu.tile import COLUMNS, ROWS, VECTORS, tiles
from mini_infer.kernels.quantized import ROTATED, QuantizedMatrix
from mini_infer.kernels.reference import quantized as reference
from mini_infer.kernels.registry import register

STEP = 32
"""The most neighbouring inputs that are multiplied before they are scaled."""

CHUNK = 96
"""Tokens of one task when codes become values, so that their sums stay in the cache."""

_WORD, _NUMBER = ir.IntType(32), ir.FloatType()
_TILE, _VALUES, _SUMS = integers.ROWS * COLUMNS, STEP * COLUMNS, CHUNK * COLUMNS  # numbers in buffers


@register("pack_quantized", backend="cpu", devices=["cpu"], priority=10)
def pack_quantized(
    matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    outputs, inputs = matrix.shape
    whole_row = matrix.group >= inputs
    unit = ROTATED if matrix.rotated else 8
    if dtype not in ELEMENTS or 0 in (outputs, inputs) or not (whole_row or matrix.group % unit == 0):
        return reference.pack_quantized(matrix, bias, dtype)
    bias = None if bias is None else bias.contiguous()
    integer = _as_integers(matrix) if dtype is torch.bfloat16 else None
    panels = _Panels.of_matrix(integer or matrix, half=integer is not None)
    product = _ValueProduct(panels, bias, dtype) if integer is None else _IntegerProduct(panels, bias)
    return product, _Rows(panels, dtype)


def _as_integers(matrix: QuantizedMatrix) -> QuantizedMatrix | None:
    """The same matrix, all of whose codes stand for integers of 8 bits; None if there is no such."""
    if matrix.codes.dtype is torch.float8_e4m3fn:
        return None
    if matrix.table is None:
        return matrix
    for factor in (1, 2, 4, 8):  # a power of two can be moved from the scales to the table: nothing is rounded
        table = matrix.table * factor
        if torch.equal(table, table.round().clamp(-128, 127)) and (integers.PERMUTES or _is_run(table)):
            return replace(matrix, table=table, scales=matrix.scales / factor)
    return None


def _is_run(table: Tensor) -> bool:
    """Whether code c stands for c plus a constant."""
    return torch.equal(table - table[0], torch.arange(16.0))


# ---- how a weight is kept --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panels:
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
    def of_matrix(cls, matrix: QuantizedMatrix, *, half: bool) -> "_Panels":
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


def _fits_half(numbers: Tensor) -> bool:
    wide = numbers.float()
    return bool(((wide.half().float() - wide).abs() <= 2**-11 * wide.abs()).all())


class _Rows:
    """Rows of the weight, as values: number r is column r % COLUMNS of panel r // COLUMNS."""

    def __init__(self, panels: _Panels, dtype: torch.dtype) -> None:
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
                number = _code(name, codes[(panel * num_words + k // in_word) * COLUMNS + column], k % in_word)
                decoded = table[np.int64(number)] if has_table else number
                side = (panel * num_scales + min(k // step, num_scales - 1)) * COLUMNS + column
                value = decoded * _scale(scales, side)
                if has_offsets:
                    value = _finished(value) + _scale(offsets, side)
                if rotates:
                    turned[k % ROTATED] = value
                    if k % ROTATED == ROTATED - 1:
                        _rotate(turned_at)
                        for i in range(ROTATED):
                            store(out, row * num_inputs + k + 1 - ROTATED + i, turned[i])
                else:
                    store(out, row * num_inputs + k, value)

    return rows


# ---- integers --------------------------------------------------------------------------------------------------------


class _IntegerProduct:
    """x Wᵀ + b with x in bfloat16, rounded to 8 bits on the way."""

    def __init__(self, panels: _Panels, bias: Tensor | None) -> None:
        kind, self._zero, self._table = _bytes(panels)
        halves: Scales = "half" if panels.scales.dtype is torch.float16 else "single"
        self._panels, self._bias = panels, bias  # the addresses below are theirs
        num_panels, num_words, _ = panels.codes.shape
        num_steps, num_scales = panels.steps, panels.scales.shape[1]
        self._kernel = _integer_kernel(kind, halves, panels.offsets is not None)
        self._quantize = _quantize_kernel(kind != "int8", panels.rotated)
        self._num_runs = -(-panels.codes.nbytes // RUN), num_panels
        self._fixed = (
            panels.codes.data_ptr(),
            panels.scales.data_ptr(),
            0 if panels.offsets is None else panels.offsets.data_ptr(),
            self._table.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            panels.shape[0],
            num_steps,
            panels.step // 8,
            num_words * 4 * COLUMNS,
            num_panels,
            num_scales,
        )
        self._num_steps, self._work = num_steps, panels.codes.numel()

    def __call__(self, x: Tensor) -> Tensor:
        outputs, inputs = self._panels.shape
        rows = x.reshape(-1, inputs).contiguous()
        num_tokens, num_steps, step = rows.shape[0], self._num_steps, self._panels.step
        rounded = torch.empty((num_tokens, num_steps * step), dtype=torch.int8)
        sides = torch.empty((num_tokens, 3, num_steps), dtype=torch.float32)
        self._quantize(
            num_tokens, rows.data_ptr(), rounded.data_ptr(), sides.data_ptr(), inputs, num_steps, step, self._zero,
            work=rows.numel(),
        )  # fmt: skip
        out = torch.empty((*x.shape[:-1], outputs), dtype=torch.bfloat16)
        num_chunks = -(-num_tokens // TOKENS)
        num_runs = min(self._num_runs[1], max(self._num_runs[0], 2 * torch.get_num_threads()))
        self._kernel(
            num_runs * num_chunks, rounded.data_ptr(), sides.data_ptr(), out.data_ptr(), num_tokens, num_chunks,
            num_runs, *self._fixed, work=self._work,
        )  # fmt: skip
        return out


def _bytes(panels: _Panels) -> tuple[Kind, int, Tensor]:
    """How the tile reads the codes, what it adds to each so that it is not negative, and its table of bytes."""
    table = panels.table
    if panels.of is torch.int8:
        return "int8", 128, torch.empty(0)
    if table is None:
        return "int4", 0, torch.empty(0)
    if _is_run(table):
        return "int4", -int(table[0]), torch.empty(0)
    return "table", 128, (table + 128).to(torch.uint8).repeat(4)


@functools.cache
def _quantize_kernel(apart: bool, rotates: bool) -> Kernel:
    """Round x to 8 bits, or x rotated; `apart`: each eight with those at even places first."""

    @kernel
    def quantize(args):
        x, rounded = pointer(args[FIRST], np.uint16), pointer(args[FIRST + 1], np.int8)
        scales, starts = pointer(args[FIRST + 2], np.float32), pointer(args[FIRST + 2], np.int32)
        inputs, num_steps, step, zero = args[FIRST + 3], args[FIRST + 4], args[FIRST + 5], args[FIRST + 6]
        whole = pointer(buffer(STEP), np.int32)
        bits = pointer(buffer(1), np.uint16)
        turned_at = buffer(STEP)
        turned = pointer(turned_at, np.float32)
        for row in tasks(args):
            for number in range(num_steps):
                first, to = row * inputs + number * step, (row * num_steps + number) * step
                count = min(step, inputs - number * step)
                top = np.uint16(0)  # of the numbers without their signs, which are in the order of their bits
                for i in range(count):
                    size = np.uint16(x[first + i] & 0x7FFF)
                    top = max(top, size)
                bits[0] = top
                largest, total = load(bits, 0), np.int32(0)
                if rotates:
                    for i in range(STEP):
                        turned[i] = load(x, first + i)
                    _rotate(turned_at)
                    largest = np.float32(0)
                    for i in range(STEP):
                        largest = max(largest, abs(turned[i]))
                scale = largest * np.float32(1 / 127)
                inverse = np.float32(1) / scale if scale > np.float32(1e-38) else np.float32(0)
                if top >= 0x7F80 or largest == np.inf:  # some are not finite, and so nothing of the row shall be
                    scale, count = np.float32(np.nan), 0
                for i in range(count):
                    whole[i] = nearest((turned[i] if rotates else load(x, first + i)) * inverse)
                    total += whole[i]
                for i in range(count, step):
                    whole[i] = 0
                for i in range(0, step, 8):
                    for j in range(4):
                        rounded[to + i + j] = whole[i + 2 * j] if apart else whole[i + j]
                        rounded[to + i + 4 + j] = whole[i + 2 * j + 1] if apart else whole[i + 4 + j]
                place = row * 3 * num_steps + number
                scales[place] = scale
                starts[place + num_steps] = -zero * total
                scales[place + 2 * num_steps] = scale * np.float32(total)

    return quantize


@functools.cache
def _integer_kernel(kind: Kind, halves: Scales, offsets: bool) -> Kernel:
    scale_bytes = COLUMNS * (2 if halves == "half" else 4)
    eight_bytes = COLUMNS * (8 if kind == "int8" else 4)
    shifted = int(offsets)
    most = integers.ROWS

    @kernel
    def linear(args):
        x, sides, out = args[FIRST], args[FIRST + 1], pointer(args[FIRST + 2], np.uint16)
        num_tokens, num_chunks, num_runs = args[FIRST + 3], args[FIRST + 4], args[FIRST + 5]
        codes, scales, offsets, table = args[FIRST + 6], args[FIRST + 7], args[FIRST + 8], args[FIRST + 9]
        bias, has_bias = pointer(args[FIRST + 10], np.uint16), args[FIRST + 10] != 0
        num_outputs, steps, eights = args[FIRST + 11], args[FIRST + 12], args[FIRST + 13]
        panel_bytes, num_panels, num_scales = args[FIRST + 14], args[FIRST + 15], args[FIRST + 16]
        scale_stride = scale_bytes if num_scales == steps else 0
        x_stride, side_stride = steps * eights * 8, steps * 12
        sums_at = buffer(_TILE)
        sums = pointer(sums_at, np.float32)
        for task in tasks(args):
            run, chunk = task // num_chunks, task % num_chunks
            begin = num_tokens * chunk // num_chunks
            end = num_tokens * (chunk + 1) // num_chunks
            num_passes = (end - begin + most - 1) // most
            for panel in range(num_panels * run // num_runs, num_panels * (run + 1) // num_runs):
                w, column = codes + panel * panel_bytes, panel * COLUMNS
                width = min(COLUMNS, num_outputs - column)
                for number in range(num_passes):
                    first = begin + (end - begin) * number // num_passes
                    last = begin + (end - begin) * (number + 1) // num_passes
                    # Each pass fetches its share of the next panel. A single one need not: it waits for memory anyway.
                    ahead = w + panel_bytes + panel_bytes * number // num_passes if num_passes > 1 else w
                    ahead_stride = eight_bytes // num_passes if num_passes > 1 else 0
                    integer_tile(
                        kind, halves, shifted, last - first, x + first * x_stride, x_stride,
                        sides + first * side_stride, steps, eights, w, scales + panel * num_scales * scale_bytes,
                        offsets + panel * num_scales * scale_bytes, scale_stride, table, sums_at, ahead, ahead_stride,
                    )  # fmt: skip
                    for row in range(last - first):
                        place, at = (first + row) * num_outputs + column, row * COLUMNS
                        if has_bias:
                            for i in range(width):
                                store(out, place + i, load(sums, at + i) + load(bias, column + i))
                        elif width == COLUMNS:
                            for i in range(COLUMNS):  # a constant number of steps, which needs no check in between
                                store(out, place + i, load(sums, at + i))
                        else:
                            for i in range(width):
                                store(out, place + i, load(sums, at + i))

    return linear


# ---- values ----------------------------------------------------------------------------------------------------------


class _ValueProduct:
    """x Wᵀ + b, multiplied in float32."""

    def __init__(self, panels: _Panels, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._panels, self._bias, self._dtype = panels, bias, dtype
        self._table = torch.empty(0) if panels.table is None else panels.table.contiguous()
        num_panels, num_words, _ = panels.codes.shape
        self._kernel = _value_kernel(panels.of, panels.table is not None, panels.offsets is not None, ELEMENTS[dtype])
        self._fixed = (
            panels.codes.data_ptr(),
            panels.scales.data_ptr(),
            0 if panels.offsets is None else panels.offsets.data_ptr(),
            self._table.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            panels.shape[0],
            panels.shape[1],
            panels.steps,
            panels.step,
            num_words,
            panels.scales.shape[1],
        )
        self._num_panels, self._work = num_panels, panels.codes.numel()

    def __call__(self, x: Tensor) -> Tensor:
        outputs, inputs = self._panels.shape
        rows = x.reshape(-1, inputs).contiguous()
        if self._panels.rotated:
            rows = _rotated(rows)
        elif self._dtype is torch.bfloat16:
            rows = _widened(rows)
        num_tokens = rows.shape[0]
        out = torch.empty((*x.shape[:-1], outputs), dtype=self._dtype)
        num_chunks = -(-num_tokens // CHUNK)
        scratch = torch.empty((torch.get_num_threads(), _VALUES + _SUMS), dtype=torch.float32)
        self._kernel(
            self._num_panels * num_chunks, rows.data_ptr(), out.data_ptr(), num_tokens, num_chunks, *self._fixed,
            scratch.data_ptr(), work=self._work,
        )  # fmt: skip
        return out


def _rotated(x: Tensor) -> Tensor:
    """x as float32, its neighbours rotated, by a kernel of ours, which can be recorded."""
    turned = torch.empty(x.shape, dtype=torch.float32)
    _rotate_kernel(ELEMENTS[x.dtype])(len(x), x.data_ptr(), turned.data_ptr(), x.shape[1], work=2 * x.numel())
    return turned


@functools.cache
def _rotate_kernel(element: type) -> Kernel:
    @kernel
    def rotate(args):
        x, turned, width = pointer(args[FIRST], element), pointer(args[FIRST + 1], np.float32), args[FIRST + 2]
        for row in tasks(args):
            for first in range(row * width, (row + 1) * width, ROTATED):
                for i in range(first, first + ROTATED):
                    turned[i] = load(x, i)
                _rotate(args[FIRST + 1] + 4 * first)

    return rotate


@intrinsic
def _rotate(typing_context, address):
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


@functools.cache
def _value_kernel(of: torch.dtype, has_table: bool, has_offsets: bool, element: type) -> Kernel:
    name = str(of)
    in_word = 8 if of is torch.uint8 else 4

    @kernel
    def linear(args):
        x, out = args[FIRST], pointer(args[FIRST + 1], element)
        num_tokens, num_chunks = args[FIRST + 2], args[FIRST + 3]
        codes, scales = pointer(args[FIRST + 4], np.int32), pointer(args[FIRST + 5], np.float32)
        offsets = pointer(args[FIRST + 6], np.float32)
        table = pointer(args[FIRST + 7], np.float32)
        bias, has_bias = pointer(args[FIRST + 8], element), args[FIRST + 8] != 0
        num_outputs, num_inputs, num_steps = args[FIRST + 9], args[FIRST + 10], args[FIRST + 11]
        step, num_words, num_scales = args[FIRST + 12], args[FIRST + 13], args[FIRST + 14]
        x_stride = 4 * num_inputs
        values_at = args[FIRST + 15] + thread_number(args) * 4 * (_VALUES + _SUMS)
        sums_at = values_at + 4 * _VALUES
        values, sums = pointer(values_at, np.float32), pointer(sums_at, np.float32)
        for task in tasks(args):
            panel, chunk = task // num_chunks, task % num_chunks
            begin = num_tokens * chunk // num_chunks
            end = num_tokens * (chunk + 1) // num_chunks
            for i in range((end - begin) * COLUMNS):
                sums[i] = np.float32(0)
            for at_step in range(num_steps):
                first_k = at_step * step
                words = panel * num_words + first_k // in_word
                side = (panel * num_scales + min(at_step, num_scales - 1)) * COLUMNS
                for group in range(step // in_word):
                    for place in range(in_word):
                        to, at = (group * in_word + place) * COLUMNS, (words + group) * COLUMNS
                        for i in range(COLUMNS):
                            number = _code(name, codes[at + i], place)
                            decoded = table[np.int64(number)] if has_table else number
                            scaled = decoded * scales[side + i]
                            values[to + i] = scaled + offsets[side + i] if has_offsets else scaled
                for first in range(begin, end, ROWS):
                    tiles(
                        "fma", min(ROWS, end - first), VECTORS, 1, 0, x + first * x_stride + 4 * first_k, x_stride,
                        values_at, COLUMNS * 4, min(step, num_inputs - first_k),
                        sums_at + (first - begin) * COLUMNS * 4, COLUMNS * 4, 0, 0,
                    )  # fmt: skip
            column = panel * COLUMNS
            for row in range(end - begin):
                place, at = (begin + row) * num_outputs + column, row * COLUMNS
                for i in range(min(COLUMNS, num_outputs - column)):
                    shift = load(bias, column + i) if has_bias else np.float32(0)
                    store(out, place + i, load(sums, at + i) + shift)

    return linear


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
def _code(typing_context, of, word, place):
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
