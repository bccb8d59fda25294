HINT = {"en": "must not be read", "zh": "不该读到"}

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference, register


@triton.jit
def rmsnorm_kernel(x, weight, y, hidden_size, x_stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < hidden_size

    wide = tl.load(x + row * x_stride + col).to(tl.float32)
    scale = tl.load(weight + col, inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden_size + eps)
    tl.store(y + row * hidden_size + col, wide * inverse_rms * scale, inside)


@register("rmsnorm", backend="mine")
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float64:
        return reference.norm.rmsnorm(x, weight, eps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    hidden_size = x.shape[-1]
    rows = x.reshape(-1, hidden_size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    grid = (len(rows),)
    BLOCK = triton.next_power_of_2(hidden_size)
    rmsnorm_kernel[grid](rows, weight.contiguous(), y, hidden_size, rows.stride(0), eps, BLOCK=BLOCK)
    return y
