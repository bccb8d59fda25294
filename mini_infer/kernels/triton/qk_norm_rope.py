"""QK-norm and rotary position embedding in one pass: what Qwen3 does to its queries and keys.

The idea. Every head of q and k is normalised by RMSNorm over its own head_dim features and then turned by RoPE. Done
apart, that is three launches, and q and k cross the memory bus four times; here it is one launch and two crossings.

    token t:  cos[p, :], sin[p, :] ─────────────────────────────────┐
                                                                    ▼
    q head 0 │ a a a a │ b b b b │ rest │─►1/rms─► * q_weight ─►  turn a, b ─► store
    q head 1 │ a a a a │ b b b b │ rest │─►1/rms─► * q_weight ─►  turn a, b ─► store
    k head 0 │ a a a a │ b b b b │ rest │─►1/rms─► * k_weight ─►  turn a, b ─► store
                    registers            one number per row

Grid, tiles and masks are those of `rope`: one program per token (and group of heads), with a head's features in tiles
a, b and, if RoPE turns only a part of the head, rest. A row's sum of squares is the sum over its tiles. The weight's
features pair up like a head's, so `load_pairs` reads it, too.

Memory. Loaded: q and k once, angles and both weights from the L2 cache. Written: q and k. With T tokens, H query and K
key heads of D features of b bytes:

    bytes = 2 T (H + K) D b + 8 T half          FLOPs = 7 T (H + K) D          floor time = bytes / copy bandwidth
"""

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import reference
from mini_infer.kernels.triton.launch import launches
from mini_infer.kernels.triton.rope import fits, launch, load_angles, load_pairs, turn_and_store


@triton.jit
def scaled(x, inverse_rms, weight):
    """Normalised x times weight, rounded after each of the two like the reference, which does them apart."""
    normed = (x.to(tl.float32) * inverse_rms).to(x.dtype)
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def norm_and_turn(
    source, target, inside, a, b, weight, cosines, sines, eps,
    head_dim: tl.constexpr, half: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    squares = tl.sum(wide_a * wide_a + wide_b * wide_b, axis=1, keep_dims=True)
    if REST > 0:
        col = 2 * half + tl.arange(0, REST)[None, :]
        rest = tl.load(source + col, inside & (col < head_dim), other=0.0)
        wide_rest = rest.to(tl.float32)
        squares += tl.sum(wide_rest * wide_rest, axis=1, keep_dims=True)
    inverse_rms = tl.rsqrt(squares / head_dim + eps)

    # One row of weights, as the only head of a tensor.
    weight_a, weight_b = load_pairs(weight + tl.zeros((1, 1), tl.int32), True, half, 1, HALF, INTERLEAVED)
    a, b = scaled(a, inverse_rms, weight_a), scaled(b, inverse_rms, weight_b)
    turn_and_store(target, inside, a, b, cosines, sines, half, HEADS, HALF, INTERLEAVED)
    if REST > 0:
        weight_rest = tl.load(weight + col, col < head_dim, other=0.0)
        tl.store(target + col, scaled(rest, inverse_rms, weight_rest), inside & (col < head_dim))


@triton.jit
def qk_norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, positions, q_out, k_out,
    num_heads, num_kv_heads, q_token_stride, q_head_stride, k_token_stride, k_head_stride, cos_stride, sin_stride, eps,
    head_dim: tl.constexpr, half: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    cosines, sines = load_angles(cos, sin, position, cos_stride, sin_stride, half, HALF)

    q_head = tl.program_id(1).to(tl.int64) * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]
    k_head = tl.program_id(1).to(tl.int64) * K_HEADS + tl.arange(0, K_HEADS)[:, None]
    q_inside, k_inside = q_head < num_heads, k_head < num_kv_heads
    q += token * q_token_stride + q_head * q_head_stride
    k += token * k_token_stride + k_head * k_head_stride
    q_out += (token * num_heads + q_head) * head_dim
    k_out += (token * num_kv_heads + k_head) * head_dim

    # As in `rope`: all loads of q and k are under way before the first store.
    q_a, q_b = load_pairs(q, q_inside, half, Q_HEADS, HALF, INTERLEAVED)
    k_a, k_b = load_pairs(k, k_inside, half, K_HEADS, HALF, INTERLEAVED)
    norm_and_turn(
        q, q_out, q_inside, q_a, q_b, q_weight, cosines, sines, eps,
        head_dim, half, INTERLEAVED, Q_HEADS, HALF, REST,
    )  # fmt: skip
    norm_and_turn(
        k, k_out, k_inside, k_a, k_b, k_weight, cosines, sines, eps,
        head_dim, half, INTERLEAVED, K_HEADS, HALF, REST,
    )  # fmt: skip


@launches("qk_norm_rope", reference.rotary.qk_norm_rope, fits)
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    norm = {"q_weight": q_weight.contiguous(), "k_weight": k_weight.contiguous(), "eps": eps}
    return launch(qk_norm_rope_kernel, q, k, cos, sin, position_ids, interleaved, **norm)
