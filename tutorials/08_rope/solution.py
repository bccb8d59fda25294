"""Chapter 8: turn queries and keys by their positions, in a Triton kernel.

Fill in the kernel where it says so, then run `mini-infer learn check 8`. Everything else is ready.
---
第 8 章：用 Triton 算子，把查询和键按位置旋转。

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
    # x, out     the heads: element (t, h, d) of x lies at x + t * token_stride + h * head_stride + d;
    #            out is contiguous: token_stride is num_heads * head_dim there, and head_stride is head_dim
    # cos, sin   the tables: (p, i) lies at cos + p * half + i; float32, or a narrower dtype
    # positions  one integer per token
    # HEADS, HALF  num_heads and half, rounded up to powers of two
    # ---
    # x、out     各个头：x 的元素 (t, h, d) 位于 x + t * token_stride + h * head_stride + d；
    #            out 是连续的，它的 token_stride 就是 num_heads * head_dim，head_stride 就是 head_dim
    # cos、sin   两张表：元素 (p, i) 位于 cos + p * half + i；float32，也可能是更窄的类型
    # positions  每个词元一个整数
    # HEADS、HALF  num_heads 与 half 向上取到 2 的幂
    token = tl.program_id(0).to(tl.int64)  # one program per token · 一个程序负责一个词元
    head = tl.arange(0, HEADS)[:, None]  # a column ... · 一列……
    # ... and a row: together they span a tile [HEADS, HALF] · ……一行，合起来张成瓦片 [HEADS, HALF]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (pair < half)  # the part of the tile that exists · 瓦片中真实存在的部分

    # Yours, about ten lines. Load this token's position, then row `position` of both tables, as tiles [1, HALF].
    # Load tile a (features pair) and tile b (features half + pair) of all heads. Compute in float32:
    #     a' = a cos - b sin        b' = b cos + a sin
    # and store both into out, where a and b would lie. Mask every load and every store.
    # ---
    # 由你来写，十行左右。先读出这个词元的位置，再读两张表的第 position 行，各成一片 [1, HALF]。
    # 读出所有头的 a（第 pair 个特征）和 b（第 half + pair 个特征）两片，用 float32 计算：
    #     a' = a cos - b sin        b' = b cos + a sin
    # 然后写进 out，位置与 a、b 原来的位置对应。每次读写都要带掩码。
    # hole
    position = tl.load(positions + token).to(tl.int64)
    cosines = tl.load(cos + position * half + pair, pair < half, other=0.0).to(tl.float32)
    sines = tl.load(sin + position * half + pair, pair < half, other=0.0).to(tl.float32)
    source = x + token * token_stride + head * head_stride + pair
    a = tl.load(source, inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, inside, other=0.0).to(tl.float32)
    target = out + (token * num_heads + head) * head_dim + pair
    tl.store(target, a * cosines - b * sines, inside)
    tl.store(target + half, b * cosines + a * sines, inside)
    # end


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Turn x `[..., num_heads, head_dim]`; features from 2 * half on stay as they are.
    ---
    旋转 x `[..., num_heads, head_dim]`；从第 2 * half 个特征起保持原样。
    """
    # brings the features that do not turn · 不旋转的特征随之带过来
    out = x.clone(memory_format=torch.contiguous_format)
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
    """What the engine calls. Neighbouring pairs, and float64, are left to the reference.
    ---
    引擎调用的就是它。相邻配对和 float64 交给参考实现。
    """
    if interleaved or q.dtype == torch.float64:
        return reference.apply_rotary_emb(q, k, cos, sin, position_ids, interleaved)
    return rotate(q, cos, sin, position_ids), rotate(k, cos, sin, position_ids)
