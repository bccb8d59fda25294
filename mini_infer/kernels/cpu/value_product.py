"""Products with quantised weights, in float32: for float32 x, and for codes that are no integers.

A step of a panel is turned into float32 in the first cache, and `tile` multiplies that with all tokens. Nothing is
rounded.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu.jit import (
    ELEMENTS,
    FIRST,
    Kernel,
    kernel,
    load,
    pointer,
    store,
    tasks,
    thread_number,
)
from mini_infer.kernels.cpu.linear import _widened
from mini_infer.kernels.cpu.panels import STEP, Panels, code, rotate_in_place
from mini_infer.kernels.cpu.tile import COLUMNS, ROWS, VECTORS, tiles
from mini_infer.kernels.quantized import ROTATED

CHUNK = 96
"""Tokens of one task when codes become values, so that their sums stay in the cache."""

_VALUES, _SUMS = STEP * COLUMNS, CHUNK * COLUMNS  # numbers in buffers


class ValueProduct:
    """x Wᵀ + b, multiplied in float32."""

    def __init__(self, panels: Panels, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._panels, self._bias, self._dtype = panels, bias, dtype
        self._table = torch.empty(0) if panels.table is None else panels.table.contiguous()
        num_panels, num_words, _ = panels.codes.shape
        self._kernel = _value_kernel(panels.of, panels.table is not None, panels.offsets is not None, ELEMENTS[dtype])
        self._fixed = (
            *panels.addresses(self._table, bias),
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
                rotate_in_place(args[FIRST + 1] + 4 * first)

    return rotate


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
                            number = code(name, codes[at + i], place)
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
