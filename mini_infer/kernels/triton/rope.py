"""Rotary position embedding of queries and keys in one launch.

The idea. Each head's features form pairs (a, b), and pair i of a token at position p turns by an angle that is found
in row p of two tables:

    a' = a cos[p, i] - b sin[p, i]        b' = b cos[p, i] + a sin[p, i]

All heads of a token turn by the same angles. So a program takes one token: it looks up that token's angles once, and
applies them to the query and the key heads while everything is in registers.

    positions[t] ──► p ──► cos[p, :], sin[p, :]         HALF angles, shared by all rows below
                                 │
                 half-split      ▼                      interleaved
    q head 0   │ a a a a │ b b b b │ rest │           │ a b a b a b a b │ rest │
    q head 1   │ a a a a │ b b b b │ rest │           │ a b a b a b a b │ rest │
      ...          tile      tile     copied                 one tile, split in registers
    k head 0   │ a a a a │ b b b b │ rest │           │ a b a b a b a b │ rest │

The two of a half-split pair lie `half` apart: two tiles are loaded. Those of an interleaved pair are neighbours: a load
of the a's alone would use every second element of what the memory delivers, so one tile is loaded whole and split in
registers. Features from 2 * half on are not turned, only copied.

Grid. (num_tokens, groups). One group holds all heads, unless they are so many that they would not fit the registers.

Masks. Heads beyond num_heads, and pairs beyond half where half is no power of two, are neither read nor written.

Memory. Loaded: q, k, and per token its position and a row of both tables, which is little beside so many heads. Kept:
q and k, about 32 elements per thread. Written: q and k. With T tokens, H query and K key heads of D features of b
bytes, and tables in float32:

    bytes = 2 T (H + K) D b + 8 T half          FLOPs = 3 T (H + K) D          floor time = bytes / copy bandwidth
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference
from mini_infer.kernels.triton.launch import launches, rows


@triton.jit
def load_pairs(head, inside, half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Tiles a and b `[HEADS, HALF]` of the heads that begin at the pointers `head` `[HEADS, 1]`."""
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF)[None, :]
        pairs = tl.load(head + col, inside & (col < 2 * half), other=0.0)
        a, b = tl.split(tl.reshape(pairs, (HEADS, HALF, 2)))
    else:
        col = tl.arange(0, HALF)[None, :]
        a = tl.load(head + col, inside & (col < half), other=0.0)
        b = tl.load(head + half + col, inside & (col < half), other=0.0)
    return a, b


@triton.jit
def turn_and_store(
    head, inside, a, b, cos, sin,
    half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turn the pairs by the angles `[1, HALF]` in float32 and store them where `load_pairs` would find them."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF)[None, :]
        pairs = tl.reshape(tl.join(turned_a, turned_b), (HEADS, 2 * HALF))
        tl.store(head + col, pairs, inside & (col < 2 * half))
    else:
        col = tl.arange(0, HALF)[None, :]
        tl.store(head + col, turned_a, inside & (col < half))
        tl.store(head + half + col, turned_b, inside & (col < half))


@triton.jit
def load_angles(cos, sin, position, cos_stride, sin_stride, half: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of a position, float32 `[1, HALF]`, to be shared by all heads."""
    pair = tl.arange(0, HALF)[None, :]
    cosines = tl.load(cos + position * cos_stride + pair, pair < half, other=0.0).to(tl.float32)
    sines = tl.load(sin + position * sin_stride + pair, pair < half, other=0.0).to(tl.float32)
    return cosines, sines


@triton.jit
def rope_kernel(
    q, k, cos, sin, positions, q_out, k_out,
    num_heads, num_kv_heads, q_token_stride, q_head_stride, k_token_stride, k_head_stride, cos_stride, sin_stride,
    head_dim: tl.constexpr, half: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    cosines, sines = load_angles(cos, sin, position, cos_stride, sin_stride, half, HALF)

    q_head = tl.program_id(1).to(tl.int64) * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]
    k_head = tl.program_id(1).to(tl.int64) * K_HEADS + tl.arange(0, K_HEADS)[:, None]
    q += token * q_token_stride + q_head * q_head_stride
    k += token * k_token_stride + k_head * k_head_stride
    q_out += (token * num_heads + q_head) * head_dim
    k_out += (token * num_kv_heads + k_head) * head_dim

    # All loads come before the first store, which they must not overtake: so they are all under way together.
    q_a, q_b = load_pairs(q, q_head < num_heads, half, Q_HEADS, HALF, INTERLEAVED)
    k_a, k_b = load_pairs(k, k_head < num_kv_heads, half, K_HEADS, HALF, INTERLEAVED)
    turn_and_store(q_out, q_head < num_heads, q_a, q_b, cosines, sines, half, Q_HEADS, HALF, INTERLEAVED)
    turn_and_store(k_out, k_head < num_kv_heads, k_a, k_b, cosines, sines, half, K_HEADS, HALF, INTERLEAVED)

    if REST > 0:
        col = 2 * half + tl.arange(0, REST)[None, :]
        q_inside = (q_head < num_heads) & (col < head_dim)
        k_inside = (k_head < num_kv_heads) & (col < head_dim)
        tl.store(q_out + col, tl.load(q + col, q_inside), q_inside)
        tl.store(k_out + col, tl.load(k + col, k_inside), k_inside)


class Config(NamedTuple):
    """Heads and features of one program, and how many groups of heads there are."""

    q_heads: int
    k_heads: int
    half: int
    rest: int
    groups: int
    num_warps: int


def config(num_heads: int, num_kv_heads: int, head_dim: int, half: int) -> Config:
    """All heads of a token in one program if that is at most 16384 elements; a warp for about 1024 of them."""
    tile_half = triton.next_power_of_2(max(half, 1))
    rest = triton.next_power_of_2(head_dim - 2 * half)
    features = triton.next_power_of_2(2 * tile_half + rest)
    most = max(1, 8192 // features)
    q_heads = min(triton.next_power_of_2(max(num_heads, 1)), most)
    k_heads = min(triton.next_power_of_2(max(num_kv_heads, 1)), most)
    groups = max(triton.cdiv(num_heads, q_heads), triton.cdiv(num_kv_heads, k_heads))
    warps = (q_heads + k_heads) * features // 1024
    num_warps = max(1, triton.next_power_of_2(warps + 1) // 2)  # rounded down to a power of two
    return Config(q_heads, k_heads, tile_half, rest, groups, num_warps)


def launch(
    kernel: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool, **norm: Any
) -> tuple[Tensor, Tensor]:
    """Launch this file's kernel, or the one that has the arguments `norm` as well."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k, cos, sin = rows(q, 2), rows(k, 2), rows(cos), rows(sin)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], cos.shape[1]
    tile = config(num_heads, num_kv_heads, head_dim, half)
    kernel[(num_tokens, tile.groups)](
        q=q,
        k=k,
        cos=cos,
        sin=sin,
        positions=position_ids.reshape(-1).contiguous(),
        q_out=q_out,
        k_out=k_out,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        k_token_stride=k.stride(0),
        k_head_stride=k.stride(1),
        cos_stride=cos.stride(0),
        sin_stride=sin.stride(0),
        **norm,
        **constexprs(head_dim, half, interleaved, tile),
        num_warps=tile.num_warps,
    )
    return q_out, k_out


def constexprs(head_dim: int, half: int, interleaved: bool, tile: Config) -> dict[str, int]:
    return {
        "head_dim": head_dim,
        "half": half,
        "INTERLEAVED": interleaved,
        "Q_HEADS": tile.q_heads,
        "K_HEADS": tile.k_heads,
        "HALF": tile.half,
        "REST": tile.rest,
    }


def fits(q: Tensor, *_: Any) -> bool:
    """Whether a head is small enough for a program."""
    return q.shape[-1] <= 8192


@launches("apply_rotary_emb", reference.rotary.apply_rotary_emb, fits)
def apply_rotary_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return launch(rope_kernel, q, k, cos, sin, position_ids, interleaved)
