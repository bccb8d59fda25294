"""Prompt attention: ragged chunks of new tokens attend to their contexts, through their block tables.

The idea is `paged_attention`'s online softmax, with many queries at once. A program keeps a tile of queries and walks
along the keys that any of them sees; each key that it loads serves the whole tile, so that the matrix units, not the
memory bus, set the pace: FlashAttention, Dao et al., 2022, https://arxiv.org/abs/2205.14135. Query heads that share a
KV head are rows of the same tile, as in decoding, so a tile holds fewer tokens, and less of it lies beyond the causal
edge. The search for a program's sequence, below, is described in "The Anatomy of a Triton Attention Kernel", 2025,
https://arxiv.org/abs/2511.11581.

    a tile of queries: row = token x group + head (here a group of 2; ROWS = 128 in reality)

                    0     keys of one sequence                                   context_len
                    ├─────────┬─────────┬─────────┬─────────┬─────────┬────────┬──────┤
    token 5 head 0  │  window │  clear  │  clear  │  clear  │ ■■░░░░░░│        │      │
    token 5 head 1  │  ░░■■■■ │ ■■■■■■■■│ ■■■■■■■■│ ■■■■■■■■│ ■■░░░░░░│ never  │      │    ■ visible
    token 6 head 0  │  ░░░■■■ │ ■■■■■■■■│ ■■■■■■■■│ ■■■■■■■■│ ■■■░░░░░│ looked │      │    ░ masked
    token 6 head 1  │  ░░░■■■ │ ■■■■■■■■│ ■■■■■■■■│ ■■■■■■■■│ ■■■░░░░░│   at   │      │
                    └─────────┴─────────┴─────────┴─────────┴─────────┴────────┴──────┘
                     ▲ begins with the                       ▲ ends with the causal edge
                       sliding window's tile, if any           of the last token

Grid. One program per KV head and tile of queries. How many tiles there are is known only on the device, as chunks are
ragged and each begins a tile of its own; but there are at most T // QUERIES + S for T tokens of S sequences. So many
programs start. Sequence s is given the tiles from query_start[s] // QUERIES + s on, which always leaves enough of them
(the floor may lose a tile, the + s pays it back); a program finds its sequence by bisection, and the few that are left
over exit. The host never waits to learn the lengths. Late tokens see the most keys, so the last tiles start first: the
shortest work comes at the end and fills the gaps.

Spans. A row that sees its whole span is computed as if it stood at the span's end. A span of 1, causality, is compiled
apart.

Masks. Only edge tiles need one: those that the window's or the causal edge crosses. A row that sees nothing of such a
tile has a top score of -inf, and the correction of -inf by -inf is avoided. Between the edges lies the clear part,
where a tile is nothing but two matrix products and an exponential; there the scaling is folded into the exponent
(2 ** (score * scale - top) is one multiply-add), which needs a scale that is not negative: the launcher sees to that.

Memory. Loaded: the queries once; keys and values once per tile of queries, mostly from the L2 cache, as tiles of the
same sequence run side by side. Kept: the sum, one float32 row per query. Written: the result. A prompt of T tokens
with H heads of dimension D, bytes of b per element, and K KV heads:

    bytes ≈ 2 T (H + K) D b        FLOPs = 2 T² H D (causal; twice that without)        floor time = FLOPs / matrix peak

T = 8192, H = 32, D = 128 are 550 GFLOPs: 0.7 ms at an H200's measured 790 TFLOP/s, against 0.04 ms for its 168 MB.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference
from mini_infer.kernels.triton.block_walk import arguments, find_blocks, fits, numbers, product
from mini_infer.kernels.triton.launch import Device, device_of, launches


@triton.jit
def walk(
    top, total, weighted, queries, keys_at, values_at, scales_at, table, begin, end, first, last, position, window,
    scale,
    key_stride_block, key_stride_token, value_stride_block, value_stride_token, scales_stride,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles from `begin` to `end`; tokens outside [first, last] are not touched."""
    dim, token = tl.arange(0, COLS), tl.arange(0, TILE)
    block = find_blocks(table, begin, first, last + 1, BLOCK_SIZE, TILE)
    for start in range(begin, end, TILE):
        tokens = start + token
        offset = (tokens % BLOCK_SIZE).to(tl.int64)
        keys_here = keys_at + (block * key_stride_block + offset * key_stride_token)[:, None]
        values_here = values_at + (block * value_stride_block + offset * value_stride_token)[:, None]
        if EDGE or HEAD_DIM < COLS:
            loaded = ((tokens >= first) & (tokens <= last))[:, None] & (dim < HEAD_DIM)[None, :]
            keys = tl.load(keys_here, loaded, other=0)
            values = tl.load(values_here, loaded, other=0)
        else:
            keys = tl.load(keys_here)
            values = tl.load(values_here)
        if KIND != "":
            seen = ((tokens >= first) & (tokens <= last)) if EDGE else tokens >= 0
            scales_here = scales_at + block * scales_stride + offset
            key_scales = tl.load(scales_here, seen, other=0.0).to(tl.float32)
            value_scales = tl.load(scales_here + BLOCK_SIZE, seen, other=0.0).to(tl.float32)
        block = find_blocks(table, start + TILE, first, last + 1, BLOCK_SIZE, TILE)

        scores = product(queries, tl.trans(numbers(keys, KIND, queries)))
        if KIND != "":
            scores *= key_scales[None, :]
        if EDGE:
            distance = position[:, None] - tokens[None, :]
            scores = tl.where((distance >= 0) & (distance < window), scores * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - pivot[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
            pivot = new_top
            weights = tl.exp2(scores * scale - pivot[:, None])
        correction = tl.exp2(top - pivot)
        total = total * correction + tl.sum(weights, axis=1)
        if KIND != "":
            weights *= value_scales[None, :]
        values = numbers(values, KIND, queries)
        weighted = product(weights.to(values.dtype), values, weighted * correction[:, None])
        top = new_top
    return top, total, weighted


@triton.jit(do_not_specialize=["window", "span", "num_seqs", "table_stride"])
def paged_prefill_attention_kernel(
    out, query, key_cache, value_cache, kv_scales, block_tables, context_lens, query_start, scale, window, span,
    num_seqs, table_stride, query_stride_token, query_stride_head,
    key_stride_block, key_stride_token, key_stride_head, key_stride_dim,
    value_stride_block, value_stride_token, value_stride_head, value_stride_dim,
    KIND: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    kv_head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // NUM_KV_HEADS

    seq, beyond = 0, num_seqs  # the sequence is in [seq, beyond)
    while beyond - seq > 1:
        middle = (seq + beyond) // 2
        begun = tl.load(query_start + middle).to(tl.int32) // QUERIES + middle <= tile
        seq = tl.where(begun, middle, seq)
        beyond = tl.where(begun, beyond, middle)

    chunk_start = tl.load(query_start + seq).to(tl.int32)
    chunk_len = tl.load(query_start + seq + 1).to(tl.int32) - chunk_start
    tile_start = (tile - (chunk_start // QUERIES + seq)) * QUERIES
    if tile_start >= chunk_len:
        return

    row, dim = tl.arange(0, ROWS), tl.arange(0, COLS)
    chunk_row = tile_start + row // GROUP
    stored = ((row < QUERIES * GROUP) & (chunk_row < chunk_len))[:, None] & (dim < HEAD_DIM)[None, :]
    token = (chunk_start + chunk_row).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    queries = tl.load(
        query + (token * query_stride_token + head * query_stride_head)[:, None] + dim[None, :], stored, other=0.0
    )

    context_len = tl.load(context_lens + seq).to(tl.int32)
    before = context_len - chunk_len
    position = before + chunk_row
    lowest = before + tile_start
    highest = before + tl.minimum(tile_start + QUERIES, chunk_len) - 1
    if CAUSAL:
        last, all_see = highest, lowest + 1  # the last key that any row sees, and how many all of them see
    else:
        last = tl.minimum((highest // span + 1) * span, context_len) - 1
        all_see = tl.minimum((lowest // span + 1) * span, context_len)
        position = tl.minimum((position // span + 1) * span, context_len) - 1  # as if it stood at its span's end
    first = tl.maximum(lowest - window + 1, 0)
    begin = first // TILE * TILE
    clear_begin = tl.cdiv(tl.maximum(highest - window + 1, 0), TILE) * TILE
    clear_end = tl.maximum(all_see // TILE * TILE, clear_begin)

    table = block_tables + tl.cast(seq, tl.int64) * table_stride
    keys_at = key_cache + kv_head * key_stride_head + dim[None, :] * key_stride_dim
    values_at = value_cache + kv_head * value_stride_head + dim[None, :] * value_stride_dim
    scales_at = kv_scales + kv_head * 2 * BLOCK_SIZE if KIND != "" else keys_at
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, COLS), tl.float32)
    top, total, weighted = walk(
        top, total, weighted, queries, keys_at, values_at, scales_at, table, begin,
        tl.minimum(clear_begin, last + 1), first, last, position, window, scale,
        key_stride_block, key_stride_token, value_stride_block, value_stride_token, NUM_KV_HEADS * 2 * BLOCK_SIZE,
        KIND, HEAD_DIM, BLOCK_SIZE, COLS, TILE, EDGE=True,
    )  # fmt: skip
    top, total, weighted = walk(
        top, total, weighted, queries, keys_at, values_at, scales_at, table, clear_begin, clear_end,
        first, last, position, window, scale,
        key_stride_block, key_stride_token, value_stride_block, value_stride_token, NUM_KV_HEADS * 2 * BLOCK_SIZE,
        KIND, HEAD_DIM, BLOCK_SIZE, COLS, TILE, EDGE=False,
    )  # fmt: skip
    top, total, weighted = walk(
        top, total, weighted, queries, keys_at, values_at, scales_at, table, clear_end, last + 1,
        first, last, position, window, scale,
        key_stride_block, key_stride_token, value_stride_block, value_stride_token, NUM_KV_HEADS * 2 * BLOCK_SIZE,
        KIND, HEAD_DIM, BLOCK_SIZE, COLS, TILE, EDGE=True,
    )  # fmt: skip

    place = (token * (NUM_KV_HEADS * GROUP) + head) * HEAD_DIM
    tl.store(out + place[:, None] + dim[None, :], (weighted / total[:, None]).to(out.dtype.element_ty), stored)


class Config(NamedTuple):
    """A program's tile: `rows` of queries, walking `tile` keys at a time."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int


def config(group: int, head_dim: int, itemsize: int, device: Device, causal: bool, codes: bool = False) -> Config:
    """128 rows for two groups of four warps: each key in shared memory is used 128 times, and the sums of a thread
    take 64 registers at head_dim 128. Small heads leave half of that to another program. Without tensor cores the
    factors, too, are held in registers, so rows are few and four warps of float32 would spill; but there are always
    rows enough for one token's heads. The ends of spans take registers, too: small heads then load one tile less ahead.

    Taking codes apart needs registers, too: each thread then has half as many sums, and tiles of keys are half as long.

    Shared memory holds the queries and, for every stage, a tile of keys and one of values.
    """
    row = triton.next_power_of_2(max(head_dim, 16)) * itemsize
    fewest = triton.next_power_of_2(group)
    if itemsize == 4 or not device.tensor_cores:
        rows, tile, num_warps, num_stages = max(fewest, 16), 16, 2 * itemsize, 2
    elif head_dim <= 64:
        rows, tile, num_warps, num_stages = max(fewest, 64), 64, 4, 3 if causal else 2
    else:
        rows, tile, num_warps, num_stages = 128, 64, 8, 3
    if codes:
        tile = max(tile // 2, 16)
        if rows // 2 >= max(fewest, 64):
            rows, num_warps = rows // 2, num_warps * 32 // device.lanes
        elif itemsize == 2:
            num_warps *= 2
    while (rows + num_stages * 2 * tile) * row > device.shared_memory and num_stages > 1:
        if tile > 32:
            tile //= 2
        elif num_stages > 2:
            num_stages -= 1
        elif rows > max(fewest, 64):
            rows //= 2
        elif tile > 16:
            tile //= 2
        else:
            num_stages = 1
    return Config(rows, tile, num_warps, num_stages)


@launches("paged_prefill_attention", reference.attention.paged_prefill_attention, fits)
def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
    sliding_window: int | None,
    span: int,
    kv_scales: Tensor | None = None,
) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    num_seqs = block_tables.shape[0]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    if scale < 0:
        query, scale = -query, -scale
    group = num_heads // num_kv_heads
    plan = config(group, head_dim, query.element_size(), device_of(query), span == 1, kv_scales is not None)
    tiles = tile_sizes(num_kv_heads, group, head_dim, block_size, plan)
    most_tiles = num_tokens // tiles["QUERIES"] + num_seqs
    paged_prefill_attention_kernel[(most_tiles * num_kv_heads,)](
        out=out,
        query_start=query_start.contiguous(),
        num_seqs=num_seqs,
        span=max(1, min(span, block_tables.shape[1] * block_size)),  # no context is longer, and it fits 32 bits
        **arguments(query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window, kv_scales),
        **tiles,
        CAUSAL=span == 1,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out


def tile_sizes(num_kv_heads: int, group: int, head_dim: int, block_size: int, plan: Config) -> dict[str, int]:
    """The kernel's compile-time sizes: a tile holds all the heads of a group for as many tokens as there is room."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "QUERIES": plan.rows // group,
        "ROWS": plan.rows,
        "COLS": triton.next_power_of_2(max(head_dim, 16)),
        "TILE": plan.tile,
    }
