"""What both attention kernels share: the walk along a block table, and how they are launched.

A sequence's keys and values lie scattered over the cache in blocks of BLOCK_SIZE tokens; its row of the block table
says where. The kernels walk along the sequence in tiles of TILE tokens, starting at multiples of TILE:

    token           0        16       32       48       64
    tile            │───────────── 0 ─────────────────────│───── 1 ···        TILE = 64
    logical block   │── 0 ───│── 1 ───│── 2 ───│── 3 ───│── 4 ···             BLOCK_SIZE = 16
                        │        │        │        │
    table row       │   7    │   2    │   9    │   4    │ ? (never looked at if the sequence ends in block 3)
                        │        └─────┐  └──────┐
                        ▼              ▼         ▼
    cache           ··· block 7 ··· block 2 ··· block 9 ···     address = block * stride_block + offset * stride_token

Small blocks: every token of the tile looks up its own block id. Neighbours look up the same entry, which costs nothing,
as a warp reads it once. Large blocks (a multiple of TILE): the tile lies within one block, so a single look-up serves
them all, and the addresses within the tile become regular.

Unused table entries and unused slots may hold anything: an id out of range, NaN, infinity. So whatever a tile does not
need is masked out of the look-up (an id would become an address), out of the keys (a score of NaN would win the
maximum) and out of the values (a weight of 0 does not silence them: 0 * NaN is NaN).

Codes of 8 bits become numbers of the query's dtype, which holds each of them exactly, as they are loaded. Their scales,
one for each token, need not multiply a key's features: they multiply its scores, and a value's its weights.

Block ids and offsets are widened to 64 bits before they meet a stride: caches have more than 2³¹ elements.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.triton.codes import KINDS, bits, decoded

NO_WINDOW = 2**31 - 1  # longer than any context
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def find_blocks(table, start, first, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block ids of a tile's tokens `start`, `start + 1`, ...; those outside [first, end) are not looked up.

    Called one tile ahead: a tile's loads then wait for a look-up that was made while another tile was computed on.
    """
    tokens = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table + start // BLOCK_SIZE, start < end, other=0).to(tl.int64)
    else:
        return tl.load(table + tokens // BLOCK_SIZE, (tokens >= first) & (tokens < end), other=0).to(tl.int64)


@triton.jit
def numbers(loaded, KIND: tl.constexpr, like):
    """What was loaded of a cache, as numbers of the dtype of `like`."""
    if KIND == "":
        return loaded
    else:
        return decoded(loaded, KIND).to(like.dtype)


@triton.jit
def product(a, b, accumulator=None):
    """The matrix product (plus the accumulator) in float32; float32 factors are not rounded to TensorFloat-32."""
    if INTERPRETED:  # the interpreter's product takes bfloat16's bits for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=accumulator, input_precision="ieee")


def fits(query: Tensor, key_cache: Tensor, *_: Any) -> bool:
    """Whether the query heads that share a KV head are few and small enough for a program's tile."""
    group, head_dim = query.shape[1] // key_cache.shape[2], query.shape[2]
    return head_dim <= 256 and triton.next_power_of_2(group) * triton.next_power_of_2(head_dim) <= 8192


def arguments(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: Tensor | None,
) -> dict[str, Any]:
    """Both attention kernels' arguments for these tensors; a copy is made only of what no engine would make."""
    if query.stride(2) != 1:
        query = query.contiguous()
    if block_tables.stride(1) != 1:
        block_tables = block_tables.contiguous()
    strides = {
        f"{name}_stride_{dim}": stride
        for name, cache in (("key", key_cache), ("value", value_cache))
        for dim, stride in zip(("block", "token", "head", "dim"), cache.stride(), strict=True)
    }
    return {
        "query": query,
        "key_cache": bits(key_cache),
        "value_cache": bits(value_cache),
        "kv_scales": kv_scales,
        "KIND": KINDS.get(key_cache.dtype, ""),
        "block_tables": block_tables,
        "context_lens": context_lens.contiguous(),
        "scale": scale * math.log2(math.e),
        "window": NO_WINDOW if sliding_window is None else sliding_window,
        "table_stride": block_tables.stride(0),
        "query_stride_token": query.stride(0),
        "query_stride_head": query.stride(1),
        **strides,
    }
