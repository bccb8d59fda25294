"""SwiGLU's gate: y = silu(gate) * up, where x holds gate and up side by side.

The idea. Element by element there is nothing to share and nothing to wait for: the kernel is a copy that computes on
the way. It is fast exactly if it keeps enough loads under way, each as wide as the hardware allows.

               gate: I columns              up: I columns
             ├───────┬───────┬──···─┼───────┬───────┬──···─┤
    x[row]   │ p 0   │ p 1   │      │ p 0   │ p 1   │      │      p = program
             ├───────┼───────┼──···─┼───────┴───────┴──···─┘
    y[row]   │ p 0   │ p 1   │      │      a program reads the same BLOCK columns of gate and of up, I apart
             └───────┴───────┴──···─┘

Grid. ceil(num_rows / ROWS) * ceil(I / BLOCK) programs along one axis, columns first, so that programs that run together
read memory that lies together. A narrow x (I < BLOCK) puts several rows into a program.

Masks. The last block of a row may reach beyond I, into `up` or into the next row: those columns are neither read nor
written.

Memory. Loaded: x once. Kept: 16 elements of gate and 16 of up per thread, as float32. Written: y. With N rows, and
elements of b bytes:

    bytes = 3 N I b          FLOPs ≈ 5 N I          floor time = bytes / copy bandwidth
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference
from mini_infer.kernels.triton.launch import launches, rows


@triton.jit(do_not_specialize=["num_rows"])
def silu_and_mul_kernel(x, y, num_rows, size, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks_per_row = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = program % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (col < size)[None, :]

    source = x + row[:, None] * x_stride + col[None, :]
    gate = tl.load(source, inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, inside, other=0.0).to(tl.float32)

    activated = (gate / (1 + tl.exp(-gate))).to(y.dtype.element_ty)  # rounded before the product, as the reference does
    tl.store(y + row[:, None] * size + col[None, :], activated.to(tl.float32) * up, inside)


class Config(NamedTuple):
    """The tile of one program, `rows` x `block`."""

    rows: int
    block: int
    num_warps: int


def config(size: int) -> Config:
    """2048 elements for 128 threads: two 16-byte loads of gate and two of up per thread."""
    block = min(triton.next_power_of_2(size), 2048)
    return Config(2048 // block, block, num_warps=4)


@launches("silu_and_mul", reference.activation.silu_and_mul)
def silu_and_mul(x: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = rows(x)
    tile = config(size)
    grid = triton.cdiv(len(x), tile.rows) * triton.cdiv(size, tile.block)
    silu_and_mul_kernel[(grid,)](
        x, y, len(x), size, x.stride(0), ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps
    )
    return y
