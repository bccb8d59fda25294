"""Decode attention: one new token per sequence attends to all the keys and values that its block table names.

The idea. Attention is a weighted mean, out = Σ_j w_j value_j / Σ_j w_j with w_j = exp(score_j - max score). It looks as
if all scores were needed before the first value can be weighted, but a mean can be corrected on the way. Keep three
things while walking along the context: the top score so far, the total of the weights, the weighted sum of the values.
When a tile raises the top, multiply total and sum by exp(old top - new top), and they are what they would have been
had the new top been known from the start:

    top' = max(top, max(scores))                        weights = exp(scores - top')
    total' = total * exp(top - top') + Σ weights        sum' = sum * exp(top - top') + weights · values

So no score ever leaves the chip, and the context is read once. This online softmax is due to Milakov and Gimelshein,
2018, https://arxiv.org/abs/1805.02867; as an attention kernel it is FlashAttention, Dao et al., 2022,
https://arxiv.org/abs/2205.14135. Scores are multiplied by log2(e) beforehand, as the hardware's exponential has base 2.

Two things keep the memory bus busy. Grouped query heads: the query heads that share a KV head are the rows of one tile,
so its keys and values are loaded once for all of them, and the products are matrix products. Split contexts
("Flash-Decoding", Dao, Haziza, Massa and Sizov, 2023): a few long contexts would leave most of the GPU idle, so each
context is divided among several programs, and a second kernel combines their results; top and total make that the same
correction once more. On doing both in Triton: "The Anatomy of a Triton Attention Kernel", 2025,
https://arxiv.org/abs/2511.11581

                        the context of one sequence, as its block table strings it together
              ├──── share 0 ────┤├──── share 1 ────┤├─ share 2 ─┤                   grid: (sequence x KV head, split)
    KV head 0 │ ►tile►tile►tile ││ ►tile►tile►tile ││ ►tile►til░│   (split 3 has nothing to do: it exits)
    KV head 1 │ ►tile►tile►tile ││ ►tile►tile►tile ││ ►tile►til░│                   ░ masked

    one step of a program:
                          TILE tokens
              dim  ┌─────────────────────┐                 ┌──────────┐ COLS ≥ head_dim
                   │ keys, transposed    │        TILE     │ values   │
    ROWS ≥ group   └─────────────────────┘        tokens   │          │
    ┌─────────┐    ┌─────────────────────┐                 └──────────┘
    │ queries │ ─► │ scores ─► weights   │ ──────────────► ┌──────────┐
    │ (kept)  │    │ (never stored)      │                 │ sum      │ kept, with top and total: float32 registers
    └─────────┘    └─────────────────────┘                 └──────────┘

The number of splits is chosen on the host from shapes alone, and the shares are cut on the device from the lengths, so
that nothing waits for the device and a CUDA graph may replay the launch with other lengths. `block_walk` explains how
a tile finds its tokens.

Masks. Rows beyond the group (a matrix product wants at least 16) and columns beyond head_dim load as 0 and are not
stored. Tokens outside the share or before the sliding window are not loaded and score -inf, so they weigh exactly 0.

Memory. Loaded: each visible key and value once, the query once per share. Written: the result; where the context is
split, a partial result in float32 and its log-sum-exp per share, read again by the second kernel. With L tokens of
context in all, H query heads on K heads of dimension D, b bytes per element:

    bytes = 2 L K D b (+ 8 H D per share)        FLOPs = 4 L H D        floor time = bytes / copy bandwidth

That is H / K FLOPs per byte in bfloat16: decoding is bound by bandwidth, whatever the arithmetic. 32 sequences of 4096
tokens with K = 8, D = 128 are 537 MB per layer: 125 µs at the 4.3 TB/s that an H200 copies at.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference
from mini_infer.kernels.triton.block_walk import arguments, find_blocks, fits, numbers, product
from mini_infer.kernels.triton.launch import Device, device_of, launches

MAX_SPLITS: tl.constexpr = tl.constexpr(64)  # the second kernel holds so many partial results at once
MIN_SHARE: tl.constexpr = tl.constexpr(256)  # tokens; a shorter share would cost more to combine than it saves


@triton.jit
def shares(context_len, window, num_splits, TILE: tl.constexpr):
    """(first visible token, where share 0 begins, tokens per share). All but the last share are whole tiles."""
    first = tl.maximum(context_len - window, 0)
    begin = first // TILE * TILE
    even = tl.cdiv(tl.cdiv(context_len - begin, num_splits), TILE) * TILE
    return first, begin, tl.maximum(even, MIN_SHARE)


@triton.jit(do_not_specialize=["table_stride", "window", "num_kv_heads", "group"])
def paged_attention_kernel(
    out, log_sums, query, key_cache, value_cache, kv_scales, block_tables, context_lens, scale, window, num_kv_heads,
    group, table_stride, query_stride_token, query_stride_head,
    key_stride_block, key_stride_token, key_stride_head, key_stride_dim,
    value_stride_block, value_stride_token, value_stride_head, value_stride_dim,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    seq = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    split, num_splits = tl.program_id(1), tl.num_programs(1)

    context_len = tl.load(context_lens + seq).to(tl.int32)
    first, begin, share = shares(context_len, window, num_splits, TILE)
    begin += split * share
    end = tl.minimum(begin + share, context_len)
    if SPLIT and begin >= end:
        return

    row, dim, token = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, TILE)
    head = kv_head * group + row
    stored = (row < group)[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(
        query + seq * query_stride_token + head[:, None] * query_stride_head + dim[None, :], stored, other=0.0
    )
    table = block_tables + seq * table_stride
    keys_at = key_cache + kv_head * key_stride_head + dim[None, :] * key_stride_dim
    values_at = value_cache + kv_head * value_stride_head + dim[None, :] * value_stride_dim

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, COLS), tl.float32)
    block = find_blocks(table, begin, first, end, BLOCK_SIZE, TILE)
    for start in range(begin, end, TILE):
        visible = (start + token >= first) & (start + token < end)
        loaded = visible[:, None] & (dim < HEAD_DIM)[None, :]
        offset = ((start + token) % BLOCK_SIZE).to(tl.int64)
        key_slots = block * key_stride_block + offset * key_stride_token
        value_slots = block * value_stride_block + offset * value_stride_token
        keys = tl.load(keys_at + key_slots[:, None], loaded, other=0)
        values = tl.load(values_at + value_slots[:, None], loaded, other=0)
        if KIND != "":
            scales_at = kv_scales + (block * num_kv_heads + kv_head) * 2 * BLOCK_SIZE + offset
            key_scales = tl.load(scales_at, visible, other=0.0).to(tl.float32)
            value_scales = tl.load(scales_at + BLOCK_SIZE, visible, other=0.0).to(tl.float32)
        block = find_blocks(table, start + TILE, first, end, BLOCK_SIZE, TILE)

        scores = product(queries, tl.trans(numbers(keys, KIND, queries))) * scale
        if KIND != "":
            scores *= key_scales[None, :]
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))  # finite: every tile has a visible token
        weights = tl.exp2(scores - new_top[:, None])
        correction = tl.exp2(top - new_top)
        total = total * correction + tl.sum(weights, axis=1)
        if KIND != "":
            weights *= value_scales[None, :]
        values = numbers(values, KIND, queries)
        weighted = product(weights.to(values.dtype), values, weighted * correction[:, None])
        top = new_top

    # A context that is not split is a split into one: then the partial results' layout is that of the output.
    place = (seq * num_kv_heads * group + head) * num_splits + split
    nonzero = tl.where(total > 0, total, 1.0)  # only an empty context has no weights at all, and gets zeros
    result = weighted / nonzero[:, None]
    tl.store(out + place[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), stored)
    if SPLIT:
        tl.store(log_sums + place, top + tl.log2(total), row < group)


@triton.jit(do_not_specialize=["window", "num_splits", "num_heads"])
def combine_kernel(
    out, partial, log_sums, context_lens, window, num_splits, num_heads,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per sequence and query head: the mean of the partial results, weighted by 2 ** log_sum."""
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(context_lens + row // num_heads).to(tl.int32)
    _, begin, share = shares(context_len, window, num_splits, TILE)

    split, dim = tl.arange(0, MAX_SPLITS), tl.arange(0, COLS)
    written = split < tl.cdiv(context_len - begin, share)
    place = row * num_splits + split
    log_sum = tl.load(log_sums + place, written, other=float("-inf"))
    stored = dim < HEAD_DIM
    parts = tl.load(partial + place[:, None] * HEAD_DIM + dim[None, :], written[:, None] & stored[None, :], other=0.0)
    top = tl.where(context_len > 0, tl.max(log_sum, axis=0), 0.0)
    weights = tl.exp2(log_sum - top)
    total = tl.where(context_len > 0, tl.sum(weights, axis=0), 1.0)
    result = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(out + row * HEAD_DIM + dim, result.to(out.dtype.element_ty), stored)


class Config(NamedTuple):
    """How a share is walked: `tile` tokens at a time."""

    tile: int
    num_warps: int
    num_stages: int


def config(head_dim: int, itemsize: int, device: Device, codes: bool = False) -> Config:
    """Tiles of 16 KiB of keys and as much of values, two of them on their way, where the device has room for that.

    An SM needs some 40 KiB on their way to keep its part of the bus busy. Room for a second program covers the moments
    when the first one starts and ends.
    """
    token = triton.next_power_of_2(max(head_dim, 16)) * itemsize
    tile = min(max(2**14 // token, 16), 128)
    num_warps = 4
    if itemsize == 4 or not device.tensor_cores:  # then products keep their factors in registers
        tile, num_warps = min(tile, 32), 8
    if codes:  # taking them apart needs registers
        tile, num_warps = max(tile // 2, 16), 8
    in_flight = 2 if 2 * (2 * 2 * tile * token) <= device.shared_memory else 1
    return Config(tile, num_warps, num_stages=in_flight + 1)


def splits(num_seqs: int, num_kv_heads: int, max_tokens: int, device: Device) -> int:
    """How many programs share a context, from what the host knows without asking the device.

    16 programs per SM even out what the lengths leave uneven. However many sequences there are, a share should not grow
    much beyond 2048 tokens: the longest one would be computed on when all others are done.
    """
    to_fill = -(-16 * device.num_sms // (num_seqs * num_kv_heads))
    to_even_out = -(-max_tokens // 2048)
    most: int = min(-(-max_tokens // MIN_SHARE.value), MAX_SPLITS.value)
    return max(1, min(max(to_fill, to_even_out), most))


@launches("paged_attention", reference.attention.paged_attention, fits)
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    out = torch.empty((num_seqs, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    device = device_of(query)
    num_splits = splits(num_seqs, num_kv_heads, block_tables.shape[1] * block_size, device)
    partial, log_sums = out, out
    if num_splits > 1:
        partial = query.new_empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32)
        log_sums = query.new_empty((num_seqs, num_heads, num_splits), dtype=torch.float32)
    shared = arguments(query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window, kv_scales)
    plan = config(head_dim, query.element_size(), device, kv_scales is not None)
    tiles = tile_sizes(num_heads // num_kv_heads, head_dim, block_size, plan)
    paged_attention_kernel[(num_seqs * num_kv_heads, num_splits)](
        out=partial,
        log_sums=log_sums,
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        **shared,
        **tiles,
        SPLIT=num_splits > 1,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    if num_splits > 1:
        combine_kernel[(num_seqs * num_heads,)](
            out,
            partial,
            log_sums,
            shared["context_lens"],
            shared["window"],
            num_splits,
            num_heads,
            HEAD_DIM=head_dim,
            COLS=tiles["COLS"],
            TILE=plan.tile,
            num_warps=plan.num_warps,
        )
    return out


def tile_sizes(group: int, head_dim: int, block_size: int, plan: Config) -> dict[str, int]:
    """The kernel's compile-time sizes; a matrix product takes powers of two from 16 on."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "ROWS": triton.next_power_of_2(max(group, 16)),
        "COLS": triton.next_power_of_2(max(head_dim, 16)),
        "TILE": plan.tile,
    }
