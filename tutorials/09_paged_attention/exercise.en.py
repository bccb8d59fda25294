"""Chapter 9: paged attention for one new token per sequence, in a Triton kernel.

Fill in the body of the loop, then run `mini-infer learn check 9`. Everything else is ready.
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
    seq = tl.program_id(0).to(tl.int64)  # one program per sequence ...
    kv_head = tl.program_id(1).to(tl.int64)  # ... and KV head
    row, dim = tl.arange(0, ROWS), tl.arange(0, COLS)
    real_dim = dim < HEAD_DIM
    head = kv_head * GROUP + row  # the query heads that share this KV head
    mine = (row < GROUP)[:, None] & real_dim[None, :]  # the part of the tile [ROWS, COLS] that exists
    place = (seq * GROUP * tl.num_programs(1) + head)[:, None] * HEAD_DIM + dim[None, :]
    queries = tl.load(query + place, mine, other=0.0).to(tl.float32)
    table = block_tables + seq * max_blocks  # this sequence's row of the block tables

    end = tl.load(context_lens + seq).to(tl.int32)
    begin = tl.maximum(end - window, 0)  # a sliding window hides what comes before
    top = tl.full((ROWS,), float("-inf"), tl.float32)  # of each row: the highest score so far
    total = tl.zeros((ROWS,), tl.float32)  # the sum of its weights, relative to top
    weighted = tl.zeros((ROWS, COLS), tl.float32)  # the sum of weight times value
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)  # the tokens of this tile
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
        ...

    nonzero = tl.where(total > 0, total, 1.0)  # an empty context has no weights, and gets zeros
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
    """What the engine calls. Float64, and heads or groups beyond any tile, are left to the reference."""
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
