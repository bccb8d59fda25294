"""Chapter 9: paged attention for one new token per sequence, in a Triton kernel.

Fill in the body of the loop, then run `mini-infer learn check 9`. Everything else is ready.
---
第 9 章：用 Triton 算子做分页注意力，每个序列一个新词元。

填上循环体，再运行 `mini-infer learn check 9`。其余部分都已写好。
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import register
from mini_infer.kernels.reference import attention as reference

TILE = 32
NO_WINDOW = 2**31 - 1


@triton.jit
def paged_attention_kernel(
    out, query, key_cache, value_cache, block_tables, context_lens, scale, window, max_blocks,
    key_block_stride, key_token_stride, key_head_stride, key_dim_stride,
    value_block_stride, value_token_stride, value_head_stride, value_dim_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # out, query      contiguous [num_seqs, num_heads, head_dim]
    # *_cache         [num_blocks, block_size, num_kv_heads, head_dim]: element (b, o, h, d) of key_cache lies at
    #                 key_cache + b * key_block_stride + o * key_token_stride + h * key_head_stride + d * key_dim_stride
    # block_tables    contiguous [num_seqs, max_blocks]: block_tables + seq * max_blocks + i holds the id of block i
    # GROUP           query heads per KV head; ROWS and COLS are GROUP and HEAD_DIM, rounded up to powers of two >= 16
    # ---
    # out、query      连续的 [num_seqs, num_heads, head_dim]
    # *_cache         [num_blocks, block_size, num_kv_heads, head_dim]：key_cache 的元素 (b, o, h, d) 位于
    #                 key_cache + b * key_block_stride + o * key_token_stride + h * key_head_stride + d * key_dim_stride
    # block_tables    连续的 [num_seqs, max_blocks]：block_tables + seq * max_blocks + i 处存着第 i 块的编号
    # GROUP           每个 KV 头对应几个查询头；ROWS、COLS 是 GROUP、HEAD_DIM 向上取到不小于 16 的 2 的幂
    seq = tl.program_id(0).to(tl.int64)  # one program per sequence ... · 一个程序负责一个序列……
    kv_head = tl.program_id(1).to(tl.int64)  # ... and KV head · ……的一个 KV 头
    row, dim = tl.arange(0, ROWS), tl.arange(0, COLS)
    real_dim = dim < HEAD_DIM
    head = kv_head * GROUP + row  # the query heads that share this KV head · 共用这个 KV 头的查询头
    # the part of the tile [ROWS, COLS] that exists · 瓦片 [ROWS, COLS] 中真实存在的部分
    mine = (row < GROUP)[:, None] & real_dim[None, :]
    place = (seq * GROUP * tl.num_programs(1) + head)[:, None] * HEAD_DIM + dim[None, :]
    queries = tl.load(query + place, mine, other=0.0).to(tl.float32)
    table = block_tables + seq * max_blocks  # this sequence's row of the block tables · 这个序列在块表里的那一行

    end = tl.load(context_lens + seq).to(tl.int32)
    begin = tl.maximum(end - window, 0)  # a sliding window hides what comes before · 滑动窗口之前的词元看不见
    top = tl.full((ROWS,), float("-inf"), tl.float32)  # of each row: the highest score so far · 每一行至今的最高分
    total = tl.zeros((ROWS,), tl.float32)  # the sum of its weights, relative to top · 权重之和，以 top 为基准
    weighted = tl.zeros((ROWS, COLS), tl.float32)  # the sum of weight times value · 权重乘以值，再求和
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)  # the tokens of this tile · 这片瓦片里的词元
        # Yours, about fifteen lines.
        #
        # 1  Find them. Visible are the tokens before end; what is not visible must not be looked up. The id of a
        #    token's block comes from table, and the offset is its place within the block. Widen ids with
        #    .to(tl.int64) before a stride multiplies them: caches are large.
        # 2  Load tiles keys and values, [TILE, COLS], of this kv_head. Mask what does not exist with 0; to float32.
        # 3  scores [ROWS, TILE] = queries times keys transposed, times scale; -inf where a token is not visible.
        #    The product is tl.dot(x, y, input_precision="ieee").
        # 4  Bring top, total and weighted up to date: the new top, the weights tl.exp(scores - new top), and the
        #    correction of what was summed under the old top.
        # ---
        # 由你来写，十五行左右。
        #
        # 1  找到它们。end 之前的词元才看得见，看不见的不可查表。块编号从 table 查得，偏移是词元在块内的位置。
        #    编号与步长相乘之前，先用 .to(tl.int64) 扩成 64 位：缓存很大。
        # 2  读出这个 kv_head 的 keys 与 values 两片，[TILE, COLS]。不存在的用掩码填 0；转成 float32。
        # 3  scores [ROWS, TILE] 等于 queries 乘以 keys 的转置，再乘 scale；看不见的词元记为 -inf。
        #    矩阵乘法写作 tl.dot(x, y, input_precision="ieee")。
        # 4  更新 top、total、weighted：先求新的最高分，再算权重 tl.exp(scores - 新的最高分)，
        #    并把按旧最高分累加的结果校正过来。
        # hole
        visible = token < end
        block = tl.load(table + token // BLOCK_SIZE, visible, other=0).to(tl.int64)
        offset = token % BLOCK_SIZE
        loaded = visible[:, None] & real_dim[None, :]
        key_slot = block * key_block_stride + offset * key_token_stride + kv_head * key_head_stride
        value_slot = block * value_block_stride + offset * value_token_stride + kv_head * value_head_stride
        key_at = key_cache + key_slot[:, None] + dim[None, :] * key_dim_stride
        value_at = value_cache + value_slot[:, None] + dim[None, :] * value_dim_stride
        keys = tl.load(key_at, loaded, other=0.0).to(tl.float32)
        values = tl.load(value_at, loaded, other=0.0).to(tl.float32)

        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_top[:, None])
        correction = tl.exp(top - new_top)
        total = total * correction + tl.sum(weights, axis=1)
        weighted = weighted * correction[:, None] + tl.dot(weights, values, input_precision="ieee")
        top = new_top
        # end

    # an empty context has no weights, and gets zeros · 上下文为空时没有权重，结果为零
    nonzero = tl.where(total > 0, total, 1.0)
    tl.store(out + place, weighted / nonzero[:, None], mine)


@register("paged_attention", backend="mine")
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """What the engine calls. Float64, and heads or groups beyond any tile, are left to the reference.
    ---
    引擎调用的就是它。float64，以及大到没有瓦片装得下的头或组，交给参考实现。
    """
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    group = num_heads // num_kv_heads
    if query.dtype == torch.float64 or head_dim > 256 or group > 64:
        return reference.paged_attention(
            query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window
        )
    query, block_tables = query.contiguous(), block_tables.contiguous()
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    paged_attention_kernel[(num_seqs, num_kv_heads)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens.contiguous(),
        scale,
        NO_WINDOW if sliding_window is None else sliding_window,
        block_tables.shape[1],
        *key_cache.stride(),
        *value_cache.stride(),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=triton.next_power_of_2(max(group, 16)),
        COLS=triton.next_power_of_2(max(head_dim, 16)),
        TILE=TILE,
    )
    return out
