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
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    row, dim = tl.arange(0, ROWS), tl.arange(0, COLS)
    real_dim = dim < HEAD_DIM
    head = kv_head * GROUP + row
    mine = (row < GROUP)[:, None] & real_dim[None, :]
    place = (seq * GROUP * tl.num_programs(1) + head)[:, None] * HEAD_DIM + dim[None, :]
    queries = tl.load(query + place, mine, other=0.0).to(tl.float32)
    table = block_tables + seq * max_blocks

    end = tl.load(context_lens + seq).to(tl.int32)
    begin = tl.maximum(end - window, 0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
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
