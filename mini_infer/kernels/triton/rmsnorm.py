"""RMSNorm: y = weight * x / sqrt(mean(x²) + eps), row by row.

The idea. Every element of a row needs the mean over the whole row, so a straightforward PyTorch version goes over
memory again and again: square, mean, scale, weight. Here a program loads its rows into registers once, does
everything there, and stores the result: each byte of x crosses the memory bus once, each byte of y once.

              col 0                  hidden_size   BLOCK (the next power of two)
               ├──────────── x ───────────┤ masked ┤
    row 0      │■■■■■■■■■■■■■■■■■■■■■■■■■■│········│ ┐
    row 1      │■■■■■■■■■■■■■■■■■■■■■■■■■■│········│ ┘ program 0: a tile of ROWS = 2 rows
    row 2      │■■■■■■■■■■■■■■■■■■■■■■■■■■│········│ ┐
    (num_rows) │··························│········│ ┘ program 1: its second row is masked
                            │ sum of squares along the row (threads exchange partial sums)
                            ▼
                  one 1/sqrt(...) per row, in a register

Grid. ceil(num_rows / ROWS) programs. A long row fills a program by itself; short rows (small models, or the heads of a
QK-norm) share one, since a program of a few hundred bytes would be over before its cost of starting is repaid.

Masks. A tile's sides are powers of two, tensors' are not. Where the mask is false, a load touches no memory and gives
`other`, and a store is dropped. `other` is 0 because zeros add nothing to the sum of squares.

Memory. Loaded: x once, weight once per program (from the L2 cache, as all programs read the same). Kept: x as float32,
16 elements per thread. Written: y. With N rows of H elements of b bytes each:

    bytes = 2 N H b          FLOPs = 4 N H          floor time = bytes / copy bandwidth

One FLOP per byte in bfloat16, where a GPU could do hundreds: only bytes matter. 64 MB of x on an H200 (4.8 TB/s on
paper) cannot take less than 27 µs.

A row of more than 16384 elements would not fit the registers. No model has one, so it is left to the reference.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference
from mini_infer.kernels.triton.launch import launches, rows


@triton.jit(do_not_specialize=["num_rows"])  # else a batch of 16 would be compiled apart from a batch of 17
def rmsnorm_kernel(x, weight, y, num_rows, hidden_size, x_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: x may have more than 2³¹ elements
    col = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (col < hidden_size)[None, :]

    wide = tl.load(x + row[:, None] * x_stride + col[None, :], inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + col, col < hidden_size, other=0.0).to(tl.float32)

    inverse_rms = tl.rsqrt(tl.sum(wide * wide, axis=1) / hidden_size + eps)
    normed = (wide * inverse_rms[:, None]).to(y.dtype.element_ty)  # rounded here, as the reference does
    tl.store(y + row[:, None] * hidden_size + col[None, :], normed.to(tl.float32) * scale[None, :], inside)


class Config(NamedTuple):
    """The tile of one program, `rows` x `block`."""

    rows: int
    block: int
    num_warps: int


def config(hidden_size: int) -> Config:
    """16 elements per thread: two 16-byte loads of bfloat16 under way at once, four of float32, and nothing spilled."""
    block = triton.next_power_of_2(hidden_size)
    tile_rows = max(1, 4096 // block)
    return Config(tile_rows, block, num_warps=tile_rows * block // (16 * 32))


def fits(x: Tensor, *_: Any) -> bool:
    """Whether a row fits the registers of a program."""
    return x.shape[-1] <= 16384


@launches("rmsnorm", reference.norm.rmsnorm, fits)
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight = rows(x), weight.contiguous()
    num_rows, hidden_size = x.shape
    tile = config(hidden_size)
    rmsnorm_kernel[(triton.cdiv(num_rows, tile.rows),)](
        x,
        weight,
        y,
        num_rows,
        hidden_size,
        x.stride(0),
        eps,
        ROWS=tile.rows,
        BLOCK=tile.block,
        num_warps=tile.num_warps,
    )
    return y
