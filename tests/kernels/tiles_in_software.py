"""Instructions on tiles as the manuals describe them, for processors that do not have them: AMX's, and Arm's BFMMLA.

The kernel's own loops, addresses and configurations run; only the instructions are replaced. What the processor would
refuse, or what the manual leaves undefined, is noted in `FAULTS`.
"""

import importlib.util
from types import ModuleType
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from mini_infer.kernels.cpu import amx
from mini_infer.kernels.cpu.jit import load as load_number
from mini_infer.kernels.cpu.jit import pointer

TILES = np.zeros((8, 16, 64), dtype=np.uint8)
CONFIG = np.zeros(64, dtype=np.uint8)
FAULTS = np.zeros(1, dtype=np.int64)

_TILES, _CONFIG, _FAULTS = TILES.ctypes.data, CONFIG.ctypes.data, FAULTS.ctypes.data  # constants of compiled code


def amx_in_software() -> ModuleType:
    """A copy of the module `amx` that runs anywhere, on one thread at a time."""
    spec = importlib.util.spec_from_file_location("amx_in_software", amx.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    instructions = {
        "_configure": configure,
        "_release": release,
        "_zero": zero,
        "_load": load,
        "_store": store,
        "_dot": dot,
    }
    for name, function in instructions.items():
        assert hasattr(module, name)
        setattr(module, name, function)
    return module


@numba.njit
def rows_of(tile):
    return np.int64(pointer(_CONFIG, np.uint8)[48 + tile])


@numba.njit
def bytes_of(tile):
    return np.int64(pointer(_CONFIG, np.uint16)[8 + tile])


@numba.njit
def fault_unless(right):
    if not right:
        pointer(_FAULTS, np.int64)[0] += 1


@numba.njit
def configure(address):
    given, config = pointer(address, np.uint8), pointer(_CONFIG, np.uint8)
    for i in range(64):
        config[i] = given[i]
        fault_unless(not (2 <= i < 16 and given[i] != 0))
    fault_unless(config[0] == 1)
    for tile in range(8):
        fault_unless(0 < rows_of(tile) <= 16 or (rows_of(tile) == 0 and bytes_of(tile) == 0))
        fault_unless(bytes_of(tile) <= 64)
        zero(tile)


@numba.njit
def release():
    pointer(_CONFIG, np.uint8)[0] = np.uint8(0)


@numba.njit
def zero(tile):
    fault_unless(pointer(_CONFIG, np.uint8)[0] == 1)
    for i in range(1024):
        pointer(_TILES, np.uint8)[tile * 1024 + i] = np.uint8(0)


@numba.njit
def load(tile, address, stride):
    zero(tile)
    for row in range(rows_of(tile)):
        for i in range(bytes_of(tile)):
            value = pointer(address + row * stride, np.uint8)[i]
            pointer(_TILES, np.uint8)[tile * 1024 + row * 64 + i] = value


@numba.njit
def store(tile, address, stride):
    fault_unless(pointer(_CONFIG, np.uint8)[0] == 1)
    for row in range(rows_of(tile)):
        for i in range(bytes_of(tile)):
            value = pointer(_TILES, np.uint8)[tile * 1024 + row * 64 + i]
            pointer(address + row * stride, np.uint8)[i] = value


@numba.njit
def bfloat16(tile, row, column):
    """Number ``column`` of a row, as a float32."""
    return load_number(pointer(_TILES, np.uint16), tile * 512 + row * 32 + column)


@numba.njit
def dot(sums, x, w):
    fault_unless(pointer(_CONFIG, np.uint8)[0] == 1 and sums != x and sums != w and x != w)
    fault_unless(rows_of(x) == rows_of(sums) and bytes_of(w) == bytes_of(sums) and 4 * rows_of(w) == bytes_of(x))
    numbers = pointer(_TILES, np.float32)
    for row in range(rows_of(sums)):
        for k in range(rows_of(w)):
            for column in range(bytes_of(w) // 4):
                place = sums * 256 + row * 16 + column
                for half in range(2):
                    numbers[place] += bfloat16(x, row, 2 * k + half) * bfloat16(w, k, 2 * column + half)


def bfmmla(builder: Any, sums: Any, x: Any, w: Any) -> Any:
    """As `tile` writes the instruction: Arm, Architecture Reference Manual for A-profile, BFMMLA."""
    word, number = ir.IntType(32), ir.FloatType()

    def widened(numbers: Any, place: int) -> Any:
        bits = builder.bitcast(numbers, ir.VectorType(ir.IntType(16), 8))
        half = builder.zext(builder.extract_element(bits, ir.Constant(word, place)), word)
        return builder.bitcast(builder.shl(half, ir.Constant(word, 16)), number)

    for row in range(2):
        for column in range(2):
            place = ir.Constant(word, 2 * row + column)
            total = builder.extract_element(sums, place)
            for k in range(4):
                product = builder.fmul(widened(x, 4 * row + k), widened(w, 4 * column + k))
                total = builder.fadd(total, product)
            sums = builder.insert_element(sums, total, place)
    return sums
