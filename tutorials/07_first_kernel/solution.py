"""Chapter 7: RMSNorm as a Triton kernel. Fill in the body of rmsnorm_kernel; the launcher below it is done.
---
第 7 章：用 Triton 写 RMSNorm 算子。填写 rmsnorm_kernel 的函数体；它下面的启动函数已经写好。
"""

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
    ---
    一个程序写一行：y[row] = weight * x[row] / sqrt(mean(x[row]²) + eps)。

    x：           第一行的地址；下一行比上一行晚 x_stride 个元素
    weight：      hidden_size 个数的地址，所有行共用
    y：           结果的地址，各行紧挨着，相隔 hidden_size 个元素
    hidden_size： 一行有多少个数
    BLOCK：       2 的幂，不小于 hidden_size

    依次要做的事：
    1. 本程序负责哪一行（tl.program_id）、哪些列（tl.arange）；
       用 row.to(tl.int64)，张量超过 2**31 个元素时 row * 步长才不会溢出
    2. 掩码：BLOCK 列里哪些在这一行之内
    3. 隔着掩码读入这一行和权重，都转成 float32
    4. 平方的均值，加 eps，再取 1 / sqrt（tl.sum、tl.rsqrt）
    5. 隔着掩码写回；tl.store 会舍入成 y 自己的类型
    """
    # hole
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < hidden_size

    wide = tl.load(x + row * x_stride + col, inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + col, inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden_size + eps)
    tl.store(y + row * hidden_size + col, wide * inverse_rms * scale, inside)
    # end


# Step one of chapter 10: the backend "mine" now has rmsnorm. · 第 10 章的第一步：从此后端 mine 有了 rmsnorm。
@register("rmsnorm", backend="mine")
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., hidden_size], any strides; weight [hidden_size]; returns a new tensor like x.
    ---
    x [..., hidden_size]，步长任意；weight [hidden_size]；返回与 x 同形状、同类型的新张量。
    """
    if x.dtype == torch.float64:  # only tests use it: left to the reference · 只有测试才用，交给参考实现
        return reference.norm.rmsnorm(x, weight, eps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    hidden_size = x.shape[-1]
    rows = x.reshape(-1, hidden_size)  # a view where the strides allow it · 步长允许时只是视图
    if rows.stride(1) != 1:  # neighbouring columns must be neighbours in memory · 相邻的列在内存里也必须相邻
        rows = rows.contiguous()
    grid = (len(rows),)  # one program per row · 每行一个程序
    BLOCK = triton.next_power_of_2(hidden_size)
    rmsnorm_kernel[grid](rows, weight.contiguous(), y, hidden_size, rows.stride(0), eps, BLOCK=BLOCK)
    return y
