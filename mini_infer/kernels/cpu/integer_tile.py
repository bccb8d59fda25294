"""The inner loop of products with quantised weights: integers are multiplied, and scaled once per step.

    out[r, c] = Σ_s  x_scale[r, s] * w_scale[s, c] * Σ_{k in s} x[r, k] * w[k, c]  +  x_sum[r, s] * w_offset[s, c]

A step s is 8 to 64 neighbouring k with one scale for each side. Within it everything is an integer: x from -127 to 127,
w an unsigned byte, four products of which one instruction (VNNI's `vpdpbusd`) adds to an int32 for each of a vector's
columns. A weight's byte is its code plus a constant z, so that it is never negative; Σ x z is the same for all columns
and known beforehand, so the sum does not start at 0 but at -Σ x z (`x_start`), and the constant costs nothing.

    int8     one byte per code
    int4     two codes per byte, pulled apart by a mask and a shift when they arrive
    table    the same, and each code is looked up among 16 bytes by one permutation

The integer sums of R rows and V vectors fill the registers as in `tile`; the float32 sums, touched once per step, stay
in the first cache. Without VNNI the same integers come from two multiplications of 16-bit numbers, or on a processor
that is no x86 from what LLVM makes of plain ones.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018,
https://arxiv.org/abs/1712.05877
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mini_infer.kernels.cpu.jit import has_feature
from mini_infer.kernels.cpu.tile import COLUMNS, LANES, LINE, VECTORS

Kind = Literal["int8", "int4", "table"]
Scales = Literal["half", "single"]

WIDE = LANES == 16
VNNI = has_feature("avx512vnni") if WIDE else has_feature("avxvnni")
X86 = platform.machine() in ("x86_64", "AMD64")
HALF = has_feature("f16c") or WIDE
"""Whether a float16 is widened by an instruction."""

PERMUTES = X86 and has_feature("avx2")
"""Whether bytes are looked up by an instruction."""

ROWS = 6 if VNNI else 3
"""Of the largest tile; without VNNI an intermediate result needs registers, too."""

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES = ir.VectorType(_I8, 4 * LANES)
_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_WORDS = ir.VectorType(_I32, LANES)
_SUMS = ir.VectorType(_F32, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)


@intrinsic(prefer_literal=True)
def integer_tile(
    typing_context, kind, scales, offsets, rows, x, x_stride, sides, steps, eights, w, w_scales, w_offsets,
    scale_stride, table, out, ahead, ahead_stride,
):  # fmt: skip
    """One tile. The first three arguments must be constants.

    Args:
        kind: how w is written down, see above.
        scales: of w: float16 or float32.
        offsets: w has some, of the scales' dtype.
        rows: of x, 1 to `ROWS`.
        x, x_stride: address of x, int8 ``[rows, steps * eights * 8]``, and bytes between its rows. For all but "int8"
            each eight are in the order 0, 2, 4, 6, 1, 3, 5, 7, as w's bytes hold them.
        sides: address of x_scale, x_start and x_sum, float32, int32 and float32 ``[rows, 3, steps]``.
        steps, eights: how many steps, and how many times eight k each has.
        w: address of the codes, ``[steps * eights, 2, columns, 4]``, or without the 2 where a byte holds two of them.
        w_scales, w_offsets: addresses, ``[steps, columns]``.
        scale_stride: bytes between the scales of two steps; 0 if all share them.
        table: address of 16 bytes, as often as a vector holds them.
        out: address of the sums, float32 ``[rows, columns]``.
        ahead, ahead_stride: address of what will be read later, and how many bytes further it is for each eight.
    """
    constants = (kind, scales, offsets)
    if not all(isinstance(constant, types.Literal) for constant in constants):
        return None

    def codegen(context, builder, signature, args):
        how = [constant.literal_value for constant in constants]
        after = builder.append_basic_block("after")
        blocks = [builder.append_basic_block(f"rows.{rows}") for rows in range(1, ROWS + 1)]
        choice = builder.switch(args[3], blocks[-1])
        for rows, block in enumerate(blocks, 1):
            choice.add_case(_number(rows), block)
            builder.position_at_end(block)
            _write(builder, *how, rows, *args[4:])
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*constants, *[types.int64] * 14), codegen


def _write(
    builder: Any, kind: Kind, scales: Scales, offsets: int, rows: int, x: Any, x_stride: Any, sides: Any, steps: Any,
    eights: Any, w: Any, w_scales: Any, w_offsets: Any, scale_stride: Any, table: Any, out: Any, ahead: Any,
    ahead_stride: Any,
) -> None:  # fmt: skip
    """Write the loops in LLVM's language."""
    places = [(row, vector) for row in range(rows) for vector in range(VECTORS)]
    outs = [_at(builder, out, 4 * (COLUMNS * row + LANES * vector), _SUMS) for row, vector in places]
    for place in outs:
        builder.store(ir.Constant(_SUMS, [0.0] * LANES), place, align=4)
    side_bytes = builder.shl(steps, _number(2))  # of one of the three
    starts = [builder.add(x, builder.mul(x_stride, _number(row))) for row in range(rows)]
    lookup = builder.load(_at(builder, table, 0, _BYTES), align=1) if kind == "table" else None
    w_bytes = COLUMNS * (8 if kind == "int8" else 4)  # of eight k
    scale_bytes = COLUMNS * (2 if scales == "half" else 4)

    def side(row: int, which: int, step: Any, what: Any) -> Any:
        start = builder.add(sides, builder.mul(side_bytes, _number(3 * row + which)))
        place = _at(builder, builder.add(start, builder.shl(step, _number(2))), 0, what)
        return _broadcast(builder, builder.load(place, align=4))

    with _loop(builder, steps) as step:
        before, first = builder.block, [side(row, 1, step, _I32) for row in range(rows)]
        eight_loop, after = builder.append_basic_block("eights"), builder.append_basic_block("scale")
        builder.branch(eight_loop)
        builder.position_at_end(eight_loop)
        count = builder.phi(_I64)
        sums = [builder.phi(_WORDS) for _ in places]
        eight = builder.add(builder.mul(step, eights), count)
        w_at = builder.add(w, builder.mul(eight, _number(w_bytes)))
        new = list(sums)
        for four in range(2):
            codes = [_codes(builder, kind, w_at, four, vector, lookup) for vector in range(VECTORS)]
            for row in range(rows):
                x_at = builder.add(starts[row], builder.shl(eight, _number(3)))
                fours = _signed(builder, _broadcast(builder, builder.load(_at(builder, x_at, 4 * four, _I32), align=1)))
                for vector in range(VECTORS):
                    at = row * VECTORS + vector
                    new[at] = _dot(builder, new[at], codes[vector], fours)
        ahead_at = builder.add(ahead, builder.mul(eight, ahead_stride))
        for line in range(-(-w_bytes // (2 * LINE))):
            _fetch(builder, ahead_at, LINE * line)
        following = builder.add(count, _number(1))
        builder.cbranch(builder.icmp_signed("<", following, eights), eight_loop, after)
        for phi, value in zip([count, *sums], [_number(0), *(first[row] for row, _ in places)], strict=True):
            phi.add_incoming(value, before)
        for phi, value in zip([count, *sums], [following, *new], strict=True):
            phi.add_incoming(value, eight_loop)

        builder.position_at_end(after)
        scale_at = builder.mul(step, scale_stride)
        for vector in range(VECTORS):
            place = vector * scale_bytes // VECTORS
            scale = _scales(builder, scales, builder.add(w_scales, scale_at), place)
            offset = _scales(builder, scales, builder.add(w_offsets, scale_at), place) if offsets else None
            for row in range(rows):
                at = row * VECTORS + vector
                both = builder.fmul(side(row, 0, step, _F32), scale)
                total = _fma(builder, builder.sitofp(new[at], _SUMS), both, builder.load(outs[at], align=4))
                if offset is not None:
                    total = _fma(builder, side(row, 2, step, _F32), offset, total)
                builder.store(total, outs[at], align=4)


@contextmanager
def _loop(builder: Any, count: Any) -> Iterator[Any]:
    """At least one round for each number below ``count``."""
    before, body, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("end")
    builder.branch(body)
    builder.position_at_end(body)
    number = builder.phi(_I64)
    yield number
    following = builder.add(number, _number(1))
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    number.add_incoming(_number(0), before)
    number.add_incoming(following, builder.block)
    builder.position_at_end(after)


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)


def _at(builder: Any, address: Any, offset: int, what: Any) -> Any:
    return builder.inttoptr(builder.add(address, _number(offset)), what.as_pointer())


def _broadcast(builder: Any, value: Any) -> Any:
    """One number in every lane of a vector."""
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * LANES))


def _every(vector: Any, value: int) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _codes(builder: Any, kind: Kind, address: Any, four: int, vector: int, lookup: Any) -> Any:
    """A vector's unsigned bytes for one or the other four of eight k, four for each column, ready for `_dot`."""
    if kind == "int8":
        loaded = builder.load(_at(builder, address, 4 * (COLUMNS * four + LANES * vector), _WORDS), align=1)
        return _unsigned(builder, builder.xor(loaded, _every(_WORDS, 0x80808080)))  # which adds 128 to each byte
    loaded = builder.load(_at(builder, address, 4 * LANES * vector, _WORDS), align=1)
    if four:
        loaded = builder.lshr(loaded, _every(_WORDS, 4))
    codes = builder.and_(loaded, _every(_WORDS, 0x0F0F0F0F))
    if kind == "table":
        name = "llvm.x86.avx512.pshuf.b.512" if WIDE else "llvm.x86.avx2.pshuf.b"
        permuted = _call(builder, name, _BYTES, [lookup, builder.bitcast(codes, _BYTES)])
        codes = builder.bitcast(permuted, _WORDS)
    return _unsigned(builder, codes)


def _unsigned(builder: Any, words: Any) -> list[Any]:
    """Bytes 0 to 255 as `_dot` wants them: as they are, or the even and the odd ones as 16-bit numbers."""
    if VNNI:
        return [words]
    low = _every(_WORDS, 0x00FF00FF)
    return [builder.and_(words, low), builder.and_(builder.lshr(words, _every(_WORDS, 8)), low)]


def _signed(builder: Any, words: Any) -> list[Any]:
    """The same of bytes from -128 to 127."""
    if VNNI:
        return [words]
    shorts, byte = builder.bitcast(words, _SHORTS), _every(_SHORTS, 8)
    both = [builder.ashr(builder.shl(shorts, byte), byte), builder.ashr(shorts, byte)]
    return [builder.bitcast(part, _WORDS) for part in both]


def _dot(builder: Any, sums: Any, w: list[Any], x: list[Any]) -> Any:
    """Add four products in each lane."""
    if VNNI:
        return _call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", _WORDS, [sums, w[0], x[0]])
    for w_part, x_part in zip(w, x, strict=True):
        if X86:
            name = "llvm.x86.avx512.pmaddw.d.512" if WIDE else "llvm.x86.avx2.pmadd.wd"
            pair = _call(builder, name, _WORDS, [builder.bitcast(part, _SHORTS) for part in (w_part, x_part)])
            sums = builder.add(sums, pair)
        else:
            for w_half, x_half in zip(_halves(builder, w_part), _halves(builder, x_part), strict=True):
                sums = builder.add(sums, builder.mul(w_half, x_half))
    return sums


def _halves(builder: Any, pairs: Any) -> list[Any]:
    """The lower and the upper 16 bits of each word, as numbers."""
    half = _every(_WORDS, 16)
    return [builder.ashr(builder.shl(pairs, half), half), builder.ashr(pairs, half)]


def _scales(builder: Any, scales: Scales, address: Any, place: int) -> Any:
    if scales == "half":
        return builder.fpext(builder.load(_at(builder, address, place, _HALVES), align=1), _SUMS)
    return builder.load(_at(builder, address, place, _SUMS), align=1)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", _SUMS, [a, b, c])


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def _fetch(builder: Any, address: Any, offset: int) -> None:
    """Ask for a cache line, and do not wait: it is brought to the core's second cache."""
    byte = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    to_read, second_cache, data = 0, 2, 1
    numbers = [ir.Constant(_I32, value) for value in (to_read, second_cache, data)]
    builder.call(function, [_at(builder, address, offset, _I8), *numbers])
