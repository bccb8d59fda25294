"""Writing new keys and values into the paged cache: a scatter by slot.

The idea. The step's tokens lie next to each other; their places in the cache do not. Token t belongs into slot s =
slot_mapping[t], which is place s % block_size of block s // block_size. Only addresses are computed here.

    key            slot_mapping            key_cache           blocks of 4 slots
    token 0  ───────►  6  ──────┐       block 0  │    │    │    │    │
    token 1  ───────► -1        │       block 1  │    │    │ ●  │    │   slot 6 = block 1, place 2
    token 2  ───────►  9  ────┐ └────────────────────────────┘
                              └──────►  block 2  │    │ ●  │    │    │   slot 9 = block 2, place 1

Codes. A cache of 8 bits gets codes instead, and each token and head a scale beside them: the largest of its features
divided by what the largest code stands for, rounded to bfloat16. All of that happens in registers: a row of the tile is
a head, so its maximum is a reduction along the row.

Grid. (num_tokens, groups): a program carries one token's key and value, a tile of HEADS x DIM elements each; one group
holds all heads unless they are too many for the registers.

Masks. Heads and features beyond the tensor's sides, as everywhere; and slot -1 masks the whole tile, loads included,
so that padding costs nothing and lands nowhere.

Strides. All of them come as arguments, since whoever allocated the cache chose its memory order, and a copy of it
would be written in vain. Where features are neighbours, their stride is 1; Triton compiles a 1 into the kernel, which
is what lets it use 16-byte accesses. Offsets are computed in 64 bits: a cache may well have more than 2³¹ elements.

Memory. Loaded: key, value and slots. Written: as much again. With T tokens, K heads of D features of b bytes:

    bytes = 4 T K D b          FLOPs = 0          floor time = bytes / copy bandwidth
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference
from mini_infer.kernels.reference.kv_cache import LIMITS
from mini_infer.kernels.triton.codes import KINDS, bits, encoded
from mini_infer.kernels.triton.launch import launches


@triton.jit
def quantized(numbers, KIND: tl.constexpr, LIMIT: tl.constexpr):
    """Codes and scales of a tile's rows, whose masked numbers are 0."""
    numbers = numbers.to(tl.float32)
    finite = tl.sum(numbers * 0.0, axis=1) == 0.0
    largest = tl.max(tl.abs(numbers), axis=1)
    scales = tl.where(finite, largest / LIMIT, float("nan")).to(tl.bfloat16)
    wide = scales.to(tl.float32)
    inverse = tl.where(wide > 1e-37, tl.div_rn(1.0, tl.where(wide > 1e-37, wide, 1.0)), 0.0)
    codes = encoded(tl.where(finite[:, None], numbers * inverse[:, None], 0.0), KIND)
    return codes, scales


@triton.jit
def kv_write_kernel(
    key, value, key_cache, value_cache, slots, kv_scales,
    block_size, num_kv_heads,
    k_token_stride, k_head_stride, k_dim_stride,
    v_token_stride, v_head_stride, v_dim_stride,
    kc_block_stride, kc_place_stride, kc_head_stride, kc_dim_stride,
    vc_block_stride, vc_place_stride, vc_head_stride, vc_dim_stride,
    head_dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    block = slot // block_size
    place = slot % block_size
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    inside = (head < tl.where(slot >= 0, num_kv_heads, 0)) & (dim < head_dim)  # slot -1: as if there were no heads

    keys = tl.load(key + token * k_token_stride + head * k_head_stride + dim * k_dim_stride, inside, other=0.0)
    values = tl.load(value + token * v_token_stride + head * v_head_stride + dim * v_dim_stride, inside, other=0.0)
    if KIND != "":
        keys, key_scales = quantized(keys, KIND, LIMIT)
        values, value_scales = quantized(values, KIND, LIMIT)
        row = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
        side = kv_scales + (block * num_kv_heads + row) * 2 * block_size + place
        scaled = row < tl.where(slot >= 0, num_kv_heads, 0)
        tl.store(side, key_scales, scaled)
        tl.store(side + block_size, value_scales, scaled)
    key_cache += block * kc_block_stride + place * kc_place_stride
    value_cache += block * vc_block_stride + place * vc_place_stride
    tl.store(key_cache + head * kc_head_stride + dim * kc_dim_stride, keys, inside)
    tl.store(value_cache + head * vc_head_stride + dim * vc_dim_stride, values, inside)


class Config(NamedTuple):
    """Heads and features of one program, and how many groups of heads there are."""

    heads: int
    dim: int
    groups: int
    num_warps: int


def config(num_kv_heads: int, head_dim: int) -> Config:
    """All heads of a token in one program if that is at most 8192 elements; 8 keys and 8 values per thread."""
    dim = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, 8192 // dim))
    num_warps = min(16, max(1, heads * dim // (32 * 8)))
    return Config(heads, dim, triton.cdiv(num_kv_heads, heads), num_warps)


@launches("write_kv", reference.kv_cache.write_kv, fits=lambda key, *_: key.shape[2] <= 8192)
def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> None:
    if key.numel() == 0:
        return
    num_tokens, num_kv_heads, head_dim = key.shape
    tile = config(num_kv_heads, head_dim)
    kv_write_kernel[(num_tokens, tile.groups)](
        key,
        value,
        bits(key_cache),
        bits(value_cache),
        slot_mapping.contiguous(),
        kv_scales,
        key_cache.shape[1],
        num_kv_heads,
        *key.stride(),
        *value.stride(),
        *key_cache.stride(),
        *value_cache.stride(),
        head_dim=head_dim,
        HEADS=tile.heads,
        DIM=tile.dim,
        KIND=KINDS.get(key_cache.dtype, ""),
        LIMIT=LIMITS.get(key_cache.dtype, 0.0),
        num_warps=tile.num_warps,
    )
