"""Chapter 7: RMSNorm as a Triton kernel. Fill in the body of rmsnorm_kernel; the launcher below it is done."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference, register


@triton.jit
def rmsnorm_kernel(x, weight, y, hidden_size, x_stride, eps, BLOCK: tl.constexpr):
    """One program writes one row: y[row] = weight * x[row] / sqrt(mean(x[row]²) + eps).

    x:           address of the first row; row r begins x_stride elements after row r - 1
    weight:      address of hidden_size numbers, the same for every row
    y:           address of the result, whose rows lie close together: hidden_size apart
    hidden_size: how many numbers a row has
    BLOCK:       a power of two, hidden_size or more

    To do, in this order:
    1. which row this program has (tl.program_id), and which columns (tl.arange);
       row.to(tl.int64) keeps row * stride right for tensors of more than 2**31 elements
    2. a mask: which of the BLOCK columns are inside the row
    3. load the row and the weight through the mask, and make float32 of both
    4. the mean of the squares, eps, and 1 / sqrt (tl.sum, tl.rsqrt)
    5. store through the mask; tl.store rounds to y's own dtype
    """
    ...


# Step one of chapter 10: the backend "mine" now has rmsnorm.
@register("rmsnorm", backend="mine")
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., hidden_size], any strides; weight [hidden_size]; returns a new tensor like x."""
    if x.dtype == torch.float64:  # only tests use it: left to the reference
        return reference.norm.rmsnorm(x, weight, eps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    hidden_size = x.shape[-1]
    rows = x.reshape(-1, hidden_size)  # a view where the strides allow it
    if rows.stride(1) != 1:  # neighbouring columns must be neighbours in memory
        rows = rows.contiguous()
    grid = (len(rows),)  # one program per row
    BLOCK = triton.next_power_of_2(hidden_size)
    rmsnorm_kernel[grid](rows, weight.contiguous(), y, hidden_size, rows.stride(0), eps, BLOCK=BLOCK)
    return y
