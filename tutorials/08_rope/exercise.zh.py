"""第 8 章：用 Triton 算子，把查询和键按位置旋转。

在算子里标出的地方填上代码，再运行 `mini-infer learn check 8`。其余部分都已写好。
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import register
from mini_infer.kernels.reference import rotary as reference


@triton.jit
def rope_kernel(
    x, out, cos, sin, positions, num_heads, half, token_stride, head_stride, head_dim,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # x、out     各个头：x 的元素 (t, h, d) 位于 x + t * token_stride + h * head_stride + d；
    #            out 是连续的，它的 token_stride 就是 num_heads * head_dim，head_stride 就是 head_dim
    # cos、sin   两张表：元素 (p, i) 位于 cos + p * half + i；float32，也可能是更窄的类型
    # positions  每个词元一个整数
    # HEADS、HALF  num_heads 与 half 向上取到 2 的幂
    token = tl.program_id(0).to(tl.int64)  # 一个程序负责一个词元
    head = tl.arange(0, HEADS)[:, None]  # 一列……
    pair = tl.arange(0, HALF)[None, :]  # ……一行，合起来张成瓦片 [HEADS, HALF]
    inside = (head < num_heads) & (pair < half)  # 瓦片中真实存在的部分

    # 由你来写，十行左右。先读出这个词元的位置，再读两张表的第 position 行，各成一片 [1, HALF]。
    # 读出所有头的 a（第 pair 个特征）和 b（第 half + pair 个特征）两片，用 float32 计算：
    #     a' = a cos - b sin        b' = b cos + a sin
    # 然后写进 out，位置与 a、b 原来的位置对应。每次读写都要带掩码。
    ...


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """旋转 x `[..., num_heads, head_dim]`；从第 2 * half 个特征起保持原样。"""
    out = x.clone(memory_format=torch.contiguous_format)  # 不旋转的特征随之带过来
    half = cos.shape[1]
    if out.numel() == 0 or half == 0:
        return out
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.reshape(positions.numel(), *x.shape[-2:])
    num_tokens, num_heads, head_dim = rows.shape
    rope_kernel[(num_tokens,)](
        rows,
        out,
        cos.contiguous(),
        sin.contiguous(),
        positions.reshape(-1).contiguous(),
        num_heads,
        half,
        rows.stride(0),
        rows.stride(1),
        head_dim,
        HEADS=triton.next_power_of_2(num_heads),
        HALF=triton.next_power_of_2(half),
    )
    return out


@register("apply_rotary_emb", backend="mine")
def apply_rotary_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """引擎调用的就是它。相邻配对和 float64 交给参考实现。"""
    if interleaved or q.dtype == torch.float64:
        return reference.apply_rotary_emb(q, k, cos, sin, position_ids, interleaved)
    return rotate(q, cos, sin, position_ids), rotate(k, cos, sin, position_ids)
