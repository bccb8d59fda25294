"""Matrix products by AMX, the unit of Intel's server processors that multiplies whole tiles of bfloat16.

A tile is a register of up to 16 rows of 64 bytes; there are eight. One instruction, TDPBF16PS, adds to 16 x 16 sums the
products of a tile of x, 16 rows of 32 numbers, and a tile of w, 16 pairs along k of 16 columns:

    sums [16, 16] += x [16, 32] · w [16, 16, 2]        8,192 multiply-adds; "dot" of `tile` does 32

So w has to lie as "dot" reads it, and nothing is packed twice. Four sums are under way at a time, since one takes some
fifty cycles and another can begin every sixteen:

    up to 16 rows       x 4 │ sums 0 1 2 3        17 to 32 rows, twice      x 4 │ sums 0 1
                     w:     5 6 7 5                                         x 5 │ sums 2 3      w: 6 7

How many rows and bytes each tile has is a configuration that every thread loads for itself, and lets go of afterwards:
tiles that are in use cost the system time whenever it gives the core to another program.

Intel, Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import ctypes
import functools
import platform
import sys
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mini_infer.kernels.cpu.jit import has_feature, pointer

ROWS = 32
"""Rows of one `product`."""

DEPTH = 32
"""How many k a tile takes; a product's k must be a multiple."""

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def is_there() -> bool:
    """Whether the processor has AMX, and the system lets this process use it: Linux wants to be asked."""
    if not (has_feature("amx-bf16") and has_feature("amx-tile")) or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if sys.platform != "linux":
        return sys.platform == "win32"  # which asks for nothing
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def _instruction(name: str, num_tiles: int, has_place: bool, has_stride: bool = False) -> Any:
    """An instruction on tiles, whose numbers are constants; then perhaps an address, and the bytes between its rows."""

    def emit(builder: Any, tiles: Any, place: Any) -> None:
        values = [ir.Constant(_I8, tile.literal_value) for tile in tiles]
        if has_place:
            values.append(builder.inttoptr(place[0], _I8.as_pointer()))
        values += place[1:]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", (), kind), values)

    def typed(tiles: Any, place: Any) -> Any:
        if not all(isinstance(tile, types.IntegerLiteral) for tile in tiles):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(builder, tiles, args[len(tiles) :])
            return context.get_dummy_value()

        return types.void(*tiles, *[types.int64] * len(place)), codegen

    by_arguments = {
        (0, False, False): lambda context: typed((), ()),
        (0, True, False): lambda context, address: typed((), (address,)),
        (1, False, False): lambda context, tile: typed((tile,), ()),
        (1, True, True): lambda context, tile, address, stride: typed((tile,), (address, stride)),
        (3, False, False): lambda context, sums, x, w: typed((sums, x, w), ()),
    }
    function = by_arguments[num_tiles, has_place, has_stride]
    function.__name__ = name
    return intrinsic(prefer_literal=True)(function)


_configure = _instruction("ldtilecfg", 0, has_place=True)
_release = _instruction("tilerelease", 0, has_place=False)
_zero = _instruction("tilezero", 1, has_place=False)
_load = _instruction("tileloadd64", 1, has_place=True, has_stride=True)
_store = _instruction("tilestored64", 1, has_place=True, has_stride=True)
_dot = _instruction("tdpbf16ps", 3, has_place=False)


@numba.njit
def configure(rows, room):
    """Give this thread tiles for products of so many rows, up to `ROWS`; ``room`` is the address of 64 free bytes."""
    bytes_of, words_of = pointer(room, np.uint8), pointer(room, np.uint16)
    for i in range(64):
        bytes_of[i] = np.uint8(0)
    bytes_of[0] = np.uint8(1)  # the palette: eight tiles
    first, second = min(rows, 16), max(rows - 16, 0)
    for tile in range(8):
        height = 16  # of w
        if rows <= 16:
            height = first if tile <= 4 else 16
        elif tile < 6:
            height = first if tile in (0, 1, 4) else second
        words_of[8 + tile] = np.uint16(64)  # bytes of a row
        bytes_of[48 + tile] = np.uint8(height)
    _configure(room)


@numba.njit
def release():
    """This thread uses no tiles from now on."""
    _release()


@numba.njit
def product(rows, x, x_stride, w, w_stride, steps, out, out_stride):
    """Write x · w for 64 columns. The thread's tiles must be those for so many rows.

    Args:
        rows: at most `ROWS`.
        x, x_stride: address of x ``[rows, steps * DEPTH]``, bfloat16, and in bytes the distance between its rows.
        w, w_stride: the same of w ``[steps * DEPTH / 2, 64, 2]``.
        steps: how many times `DEPTH` k.
        out, out_stride: the same of the sums, float32 ``[rows, 64]``.
    """
    if rows <= 16:
        _zero(0)
        _zero(1)
        _zero(2)
        _zero(3)
        for step in range(steps):
            columns = w + step * 16 * w_stride
            _load(4, x + step * 64, x_stride)
            _load(5, columns, w_stride)
            _dot(0, 4, 5)
            _load(6, columns + 64, w_stride)
            _dot(1, 4, 6)
            _load(7, columns + 128, w_stride)
            _dot(2, 4, 7)
            _load(5, columns + 192, w_stride)
            _dot(3, 4, 5)
        _store(0, out, out_stride)
        _store(1, out + 64, out_stride)
        _store(2, out + 128, out_stride)
        _store(3, out + 192, out_stride)
    else:
        for half in range(0, 256, 128):
            _zero(0)
            _zero(1)
            _zero(2)
            _zero(3)
            for step in range(steps):
                columns = w + step * 16 * w_stride + half
                _load(4, x + step * 64, x_stride)
                _load(5, x + step * 64 + 16 * x_stride, x_stride)
                _load(6, columns, w_stride)
                _load(7, columns + 64, w_stride)
                _dot(0, 4, 6)
                _dot(1, 4, 7)
                _dot(2, 5, 6)
                _dot(3, 5, 7)
            _store(0, out + half, out_stride)
            _store(1, out + half + 64, out_stride)
            _store(2, out + 16 * out_stride + half, out_stride)
            _store(3, out + 16 * out_stride + half + 64, out_stride)
