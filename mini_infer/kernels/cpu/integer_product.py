"""Products with quantised weights, in integers.

x is rounded to 8 bits first, with a scale for every step of at most 32 neighbouring numbers (as llama.cpp does), and
`integer_tile` multiplies. An x costs a 127th of its step's largest at most, which for a normal distribution is 0.6 % of
the result. Where the weight is rotated, x is, too; then no number of a step is much larger than the others, whatever
the model.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu import integer_tile as integers
from mini_infer.kernels.cpu.integer_tile import Kind, Scales, integer_tile
from mini_infer.kernels.cpu.jit import FIRST, Kernel, buffer, kernel, load, nearest, pointer, store, tasks
from mini_infer.kernels.cpu.linear import RUN, TOKENS
from mini_infer.kernels.cpu.panels import STEP, Panels, rotate_in_place
from mini_infer.kernels.cpu.tile import COLUMNS

_TILE = integers.ROWS * COLUMNS  # numbers in the buffer for sums


def is_run(table: Tensor) -> bool:
    """Whether code c stands for c plus a constant."""
    return torch.equal(table - table[0], torch.arange(16.0))


class IntegerProduct:
    """x Wᵀ + b with x in bfloat16, rounded to 8 bits on the way."""

    def __init__(self, panels: Panels, bias: Tensor | None) -> None:
        kind, self._zero, self._table = _bytes(panels)
        halves: Scales = "half" if panels.scales.dtype is torch.float16 else "single"
        self._panels, self._bias = panels, bias  # the addresses below are theirs
        num_panels, num_words, _ = panels.codes.shape
        num_steps, num_scales = panels.steps, panels.scales.shape[1]
        self._kernel = _integer_kernel(kind, halves, panels.offsets is not None)
        self._quantize = _quantize_kernel(kind != "int8", panels.rotated)
        self._num_runs = -(-panels.codes.nbytes // RUN), num_panels
        self._fixed = (
            *panels.addresses(self._table, bias),
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


def _bytes(panels: Panels) -> tuple[Kind, int, Tensor]:
    """How the tile reads the codes, what it adds to each so that it is not negative, and its table of bytes."""
    table = panels.table
    if panels.of is torch.int8:
        return "int8", 128, torch.empty(0)
    if table is None:
        return "int4", 0, torch.empty(0)
    if is_run(table):
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
                    rotate_in_place(turned_at)
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
