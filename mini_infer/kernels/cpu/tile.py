"""The inner loop of every matrix product here: a tile of the result held in the processor's vector registers.

    out[r, c] (+)= Σ_k x[r, k] * w[k, c]        for R rows and C columns, C a few vectors wide

    registers:     w[k, :]   ┌ v0 ┬ v1 ┬ v2 ┬ v3 ┐    loaded once per k ...
                 x[0, k] ──▶ │ a  │ a  │ a  │ a  │    ... used by all R rows;
                 x[1, k] ──▶ │ a  │ a  │ a  │ a  │    x[r, k] fills a vector and is used by all of w's;
                   ...       │ a  │ a  │ a  │ a  │    the R * C sums `a` never leave their registers

Per k it loads R + 4 vectors for 4 R multiply-adds, so that arithmetic, not loading, is the limit from R ≈ 3 on; with
R = 1 it reads w exactly once, as fast as memory gives it. Goto and van de Geijn, Anatomy of High-Performance Matrix
Multiplication, 2008, https://doi.org/10.1145/1356052.1356053

Eight kinds, by what w holds and what the processor has:

    "fma"     w float32, x float32
    "widen"   w bfloat16, x float32: each w is widened on the way in; half the bytes from memory
    "twice"   "widen", two rows of w at a time
    "int8"    w int8, x float32: the same, with a quarter of the bytes
    "split"   w bfloat16 in pairs along k, x float32: a pair is 32 bits, whose upper half is one float32 as it stands,
              and whose lower half is the other once it is shifted up; two multiply-adds
    "dot"     w and x bfloat16, in pairs along k: one AVX-512 BF16 instruction adds x[k] w[k] + x[k+1] w[k+1], in
              float32, for 16 columns
    "weave"   the same instruction where w is no pairs: two rows of w are woven into pairs on the way in
    "bfmmla"  the same w and x on Arm: one BFMMLA instruction multiplies four k of two rows with two columns; two
              neighbouring rows of pairs in w, zipped, hold four k of each column

"split", "dot" and "bfmmla" read the same memory. Which of them is faster is the processor's secret: "dot" does with one
instruction what "split" needs four for, and on some processors that one takes as long. `choice` measures it.

Numba's loops give LLVM no say over registers, so this one loop is written in LLVM's own language, by a Python function
that unrolls it. Everything around it is plain Numba.
"""

import platform
from collections.abc import Sequence
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mini_infer.kernels.cpu.jit import has_feature

Kind = Literal["fma", "widen", "twice", "int8", "split", "dot", "weave", "bfmmla"]

LANES = 16 if has_feature("avx512f") else 8
"""float32 numbers in a vector register. (An Arm processor's hold 4; there LLVM takes two for one.)"""

REGISTERS = 32 if has_feature("avx512f") else 16
"""That hold a vector."""

ROWS, VECTORS = (6, 4) if REGISTERS == 32 else (6, 2)
"""The largest tile: its sums, one row of w and one x must fit the registers."""

COLUMNS = VECTORS * LANES

LINE = 64
"""Bytes that memory gives at once."""

PAIRS = has_feature("avx512bf16")
"""Whether bfloat16 can be multiplied as "dot"."""

MATRICES = platform.machine() in ("aarch64", "arm64", "ARM64") and has_feature("bf16")
"""Whether it can as "bfmmla"."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class _BFloat(ir.types.Type):  # type: ignore[misc]  # llvmlite lacks it
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_SUMS = ir.VectorType(_F32, LANES)
_WORDS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(_I16, LANES)
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_FOUR_SUMS, _FOUR_WORDS, _TWO_LONGS = ir.VectorType(_F32, 4), ir.VectorType(_I32, 4), ir.VectorType(_I64, 2)
_EIGHT_BFLOATS = ir.VectorType(_BFloat(), 8)


@intrinsic(prefer_literal=True)
def tile(
    typing_context,
    kind,
    rows,
    vectors,
    accumulate,
    lines,
    x,
    x_stride,
    w,
    w_stride,
    count,
    out,
    out_stride,
    ahead,
    ahead_stride,
):
    """One tile. The first five arguments must be constants.

    Args:
        kind: what x and w hold, see above.
        rows, vectors: the size of the tile; it is ``vectors * LANES`` columns wide.
        accumulate: add to what ``out`` holds, instead of writing over it.
        lines: how many cache lines of what will be read later are asked for at each k.
        x, x_stride: address of x ``[rows, count]``, and in bytes the distance between its rows; for "dot" and "weave"
            ``[rows, count, 2]``, bfloat16, and for "split" and "twice" the same in float32.
        w, w_stride: the same of w ``[count, columns]``; for "dot" and "split" ``[count, columns, 2]``, for "weave" and
            "twice" ``[2 * count, columns]``.
        count: how many k, for "bfmmla" an even number of pairs; at least one or two are always computed.
        out, out_stride: the same of the sums, float32 ``[rows, columns]``.
        ahead, ahead_stride: where those lines are at the first k, and how many bytes further at each following one.
    """
    constants = (kind, rows, vectors, accumulate, lines)
    if not all(isinstance(constant, types.Literal) for constant in constants):
        return None

    def codegen(context, builder, signature, args):
        _write(builder, *[constant.literal_value for constant in constants], args[5:])
        return context.get_dummy_value()

    return types.void(*constants, *[types.int64] * 9), codegen


def _write(
    builder: Any, kind: Kind, rows: int, vectors: int, accumulate: int, lines: int, operands: Sequence[Any]
) -> None:
    if kind == "bfmmla":
        _write_matrix_tile(builder, rows, vectors, accumulate, lines, operands)
    else:
        _write_tile(builder, kind, rows, vectors, accumulate, lines, operands)


def _write_tile(
    builder: Any, kind: Kind, rows: int, vectors: int, accumulate: int, lines: int, operands: Sequence[Any]
) -> None:
    """Write the loop in LLVM's language; ``operands`` are the numbers that a tile is called with, in their order."""
    x, x_stride, w, w_stride, count, out, out_stride, ahead, ahead_stride = operands
    places = [(row, vector) for row in range(rows) for vector in range(vectors)]
    # A sum waits for itself. So who adds two products at a time has two sums for each place, as long as these, w's
    # vectors and an x fit the registers.
    has_two = kind in ("split", "twice")
    chains = 2 if has_two and 2 * len(places) + 2 * vectors + 2 <= REGISTERS else 1
    out_rows = [builder.add(out, builder.mul(out_stride, ir.Constant(_I64, row))) for row in range(rows)]
    outs = [_at(builder, out_rows[row], 4 * LANES * vector, _SUMS) for row, vector in places]
    nothing = ir.Constant(_SUMS, [0.0] * LANES)
    starts = [builder.load(place, align=4) if accumulate else nothing for place in outs]
    starts += [nothing] * (len(places) * (chains - 1))
    before, loop, after = builder.block, builder.append_basic_block("tile.loop"), builder.append_basic_block("tile.end")
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = [builder.phi(_SUMS) for _ in starts]
    w_rows = builder.shl(k, ir.Constant(_I64, 1)) if kind in ("weave", "twice") else k
    w_row = builder.add(w, builder.mul(w_rows, w_stride))
    x_bytes = 3 if has_two else 2  # a float32 or a pair of bfloat16 per k; or a pair of float32
    x_column = builder.add(x, builder.shl(k, ir.Constant(_I64, x_bytes)))
    w_vectors = [_load_w(builder, kind, w_row, w_stride, vector) for vector in range(vectors)]
    x_vectors = [
        _load_x(builder, kind, builder.add(x_column, builder.mul(x_stride, ir.Constant(_I64, row))))
        for row in range(rows)
    ]
    new = list(sums)
    for place, (row, vector) in enumerate(places):
        for half in range(len(w_vectors[vector])):
            at = place + half % chains * len(places)
            new[at] = _multiply_add(builder, kind, new[at], w_vectors[vector][half], x_vectors[row][half])
    for line in range(lines):
        _fetch(builder, builder.add(ahead, builder.mul(k, ahead_stride)), LINE * line)
    next_k = builder.add(k, ir.Constant(_I64, 1))
    builder.cbranch(builder.icmp_signed("<", next_k, count), loop, after)
    for phi, first, following in zip([k, *sums], [ir.Constant(_I64, 0), *starts], [next_k, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)

    builder.position_at_end(after)
    for at, place in enumerate(outs):
        total = new[at] if chains == 1 else builder.fadd(new[at], new[at + len(places)])
        builder.store(total, place, align=4)


def _write_matrix_tile(
    builder: Any, rows: int, vectors: int, accumulate: int, lines: int, operands: Sequence[Any]
) -> None:
    """The loop for "bfmmla", whose sums are two rows by two columns each; an odd last row stands for both."""
    x, x_stride, w, w_stride, count, out, out_stride, ahead, ahead_stride = operands
    one, two = ir.Constant(_I64, 1), ir.Constant(_I64, 2)
    pairs_of = [(row, min(row + 1, rows - 1)) for row in range(0, rows, 2)]
    places = [(pair, column) for column in range(0, vectors * LANES, 2) for pair in pairs_of]
    out_rows = [builder.add(out, builder.mul(out_stride, ir.Constant(_I64, row))) for row in range(rows)]
    starts = [ir.Constant(_FOUR_SUMS, [0.0] * 4)] * len(places)
    if accumulate:
        held = [
            [builder.load(_at(builder, out_rows[row], 4 * column, _I64), align=4) for row in pair]
            for pair, column in places
        ]
        starts = [builder.bitcast(_two_longs(builder, halves), _FOUR_SUMS) for halves in held]
    before, loop, after = builder.block, builder.append_basic_block("tile.loop"), builder.append_basic_block("tile.end")
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = [builder.phi(_FOUR_SUMS) for _ in places]
    both_k = [k, builder.add(k, one)]
    w_rows = [builder.add(w, builder.mul(at, w_stride)) for at in both_k]
    x_column = builder.add(x, builder.shl(k, two))
    x_rows = [
        builder.load(
            _at(builder, builder.add(x_column, builder.mul(x_stride, ir.Constant(_I64, row))), 0, _I64), align=4
        )
        for row in range(rows)
    ]
    x_pairs = [builder.bitcast(_two_longs(builder, [x_rows[row] for row in pair]), _EIGHT_BFLOATS) for pair in pairs_of]
    new = []
    for column in range(0, vectors * LANES, 4):
        upper, lower = (builder.load(_at(builder, row, 4 * column, _FOUR_WORDS), align=4) for row in w_rows)
        for half in (0, 2):
            order = ir.Constant(_FOUR_WORDS, [half, half + 4, half + 1, half + 5])
            w_pair = builder.bitcast(builder.shuffle_vector(upper, lower, order), _EIGHT_BFLOATS)
            new += [_multiply_matrices(builder, sums[len(new) + i], x, w_pair) for i, x in enumerate(x_pairs)]
    for at in both_k:
        for line in range(lines):
            _fetch(builder, builder.add(ahead, builder.mul(at, ahead_stride)), LINE * line)
    next_k = builder.add(k, two)
    builder.cbranch(builder.icmp_signed("<", next_k, count), loop, after)
    for phi, first, following in zip([k, *sums], [ir.Constant(_I64, 0), *starts], [next_k, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)

    builder.position_at_end(after)
    for (pair, column), sum_ in zip(places, new, strict=True):
        halves = builder.bitcast(sum_, _TWO_LONGS)
        for half, row in reversed(list(enumerate(pair))):  # of a row that stands for both either half will do
            value = builder.extract_element(halves, ir.Constant(_I32, half))
            builder.store(value, _at(builder, out_rows[row], 4 * column, _I64), align=4)


def _two_longs(builder: Any, values: Sequence[Any]) -> Any:
    """A vector of two numbers with 64 bits."""
    both = ir.Constant(_TWO_LONGS, ir.Undefined)
    for place, value in enumerate(values):
        both = builder.insert_element(both, value, ir.Constant(_I32, place))
    return both


def _multiply_matrices(builder: Any, sums: Any, x: Any, w: Any) -> Any:
    """``sums [2, 2] + x [2, 4] · w [2, 4] transposed``, one instruction."""
    kind = ir.FunctionType(_FOUR_SUMS, [_FOUR_SUMS, _EIGHT_BFLOATS, _EIGHT_BFLOATS])
    name = "llvm.aarch64.neon.bfmmla"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [sums, x, w])


def _at(builder: Any, address: Any, offset: int, what: Any) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), what.as_pointer())


def _fetch(builder: Any, address: Any, offset: int) -> None:
    """Ask for a cache line, and do not wait: it is brought to the core's second cache."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    place = builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), byte)
    to_read, second_cache, data = 0, 2, 1
    builder.call(function, [place, *(ir.Constant(_I32, value) for value in (to_read, second_cache, data))])


def _load_w(builder: Any, kind: Kind, address: Any, stride: Any, vector: int) -> tuple[Any, ...]:
    """One of the vectors of a row of w; for "split" two, of the first and the second numbers of its pairs, and for
    "twice" one of each of two rows."""
    if kind == "twice":
        second = builder.add(address, stride)
        return tuple(_load_w(builder, "widen", row, stride, vector)[0] for row in (address, second))
    if kind == "weave":
        rows = [_at(builder, row, 2 * LANES * vector, _HALVES) for row in (address, builder.add(address, stride))]
        return (builder.bitcast(_woven(builder, [builder.load(row, align=2) for row in rows]), _WORDS),)
    if kind == "int8":
        bytes_ = ir.VectorType(ir.IntType(8), LANES)
        loaded = builder.load(_at(builder, address, LANES * vector, bytes_), align=1)
        return (builder.sitofp(builder.sext(loaded, _WORDS), _SUMS),)
    if kind == "widen":
        loaded = builder.load(_at(builder, address, 2 * LANES * vector, _HALVES), align=2)
        shift = ir.Constant(_WORDS, [16] * LANES)
        return (builder.bitcast(builder.shl(builder.zext(loaded, _WORDS), shift), _SUMS),)
    loaded = builder.load(_at(builder, address, 4 * LANES * vector, _SUMS if kind == "fma" else _WORDS), align=4)
    if kind == "split":
        first = builder.shl(loaded, ir.Constant(_WORDS, [16] * LANES))
        second = builder.and_(loaded, ir.Constant(_WORDS, [0xFFFF0000] * LANES))
        return builder.bitcast(first, _SUMS), builder.bitcast(second, _SUMS)
    return (loaded,)


def _load_x(builder: Any, kind: Kind, address: Any) -> tuple[Any, ...]:
    """One x, in every lane of a vector; for "split" and "twice" two of them."""
    if kind in ("split", "twice"):
        both = [_load_x(builder, "fma", builder.add(address, ir.Constant(_I64, 4 * half))) for half in range(2)]
        return both[0] + both[1]
    single, vector = (_I32, _WORDS) if kind in ("dot", "weave") else (_F32, _SUMS)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(
        undefined, builder.load(_at(builder, address, 0, single), align=4), ir.Constant(_I32, 0)
    )
    return (builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * LANES)),)


def _multiply_add(builder: Any, kind: Kind, sums: Any, w: Any, x: Any) -> Any:
    if kind in ("dot", "weave"):
        name, operands = "llvm.x86.avx512bf16.dpbf16ps.512", [_SUMS, _PAIRS, _PAIRS]
        values = [sums, builder.bitcast(w, _PAIRS), builder.bitcast(x, _PAIRS)]
    else:
        name, operands, values = f"llvm.fma.v{LANES}f32", [_SUMS] * 3, [w, x, sums]
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_SUMS, operands), name)
    return builder.call(function, values)


def _woven(builder: Any, halves: Sequence[Any]) -> Any:
    """Pairs of one number of each of two vectors of 16 bits."""
    order = ir.Constant(ir.VectorType(_I32, 2 * LANES), [i // 2 + i % 2 * LANES for i in range(2 * LANES)])
    return builder.shuffle_vector(*halves, order)


@intrinsic
def interleave(typing_context, to, first, second):
    """Write `LANES` pairs of 16 bits, one of each from either address."""

    def codegen(context, builder, signature, args):
        to, *sources = args
        pairs = _woven(builder, [builder.load(_at(builder, source, 0, _HALVES), align=2) for source in sources])
        builder.store(pairs, _at(builder, to, 0, pairs.type), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def fetch(typing_context, address):
    """Ask for the cache line at an address, as a `tile` asks for its ``lines``."""

    def codegen(context, builder, signature, args):
        _fetch(builder, args[0], 0)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic(prefer_literal=True)
def tiles(
    typing_context, kind, rows, vectors, accumulate, lines, x, x_stride, w, w_stride, count, out, out_stride, ahead,
    ahead_stride,
):  # fmt: skip
    """A `tile` whose number of rows, up to `ROWS`, is not a constant: a function that all such calls of a kernel share,
    since most of what it takes to compile one is for its tiles."""
    constants = (kind, vectors, accumulate, lines)
    if not all(isinstance(constant, types.Literal) for constant in constants):
        return None

    def codegen(context, builder, signature, args):
        what, *others = [constant.literal_value for constant in constants]
        name = "-".join(map(str, ("tiles", what, *others)))
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_I64] * 10), name)
            function.linkage = "internal"
            inside = ir.IRBuilder(function.append_basic_block())
            sizes = {size: function.append_basic_block() for size in range(1, ROWS + 1)}
            switch = inside.switch(function.args[0], sizes[ROWS])
            for size, block in sizes.items():
                switch.add_case(ir.Constant(_I64, size), block)
                inside.position_at_end(block)
                _write(inside, what, size, *others, function.args[1:])
                inside.ret_void()
        builder.call(function, [args[1], *args[5:]])
        return context.get_dummy_value()

    return types.void(kind, types.int64, vectors, accumulate, lines, *[types.int64] * 9), codegen


def widest(width: int, rows: int = ROWS) -> int:
    """How many vectors wide the tiles of so many rows should be that cover ``width`` columns; 0 if none do."""
    most = min(4, (REGISTERS - 1) // (rows + 1))
    return max((vectors for vectors in range(1, most + 1) if width % (vectors * LANES) == 0), default=0)
