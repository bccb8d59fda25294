"""Chapter 8: turn queries and keys by their positions, in a Triton kernel.

Fill in the kernel where it says so, then run `mini-infer learn check 8`. Everything else is ready.
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
    token = tl.program_id(0).to(tl.int64)  # one program per token
    head = tl.arange(0, HEADS)[:, None]  # a column ...
    pair = tl.arange(0, HALF)[None, :]  # ... and a row: together they span a tile [HEADS, HALF]
    inside = (head < num_heads) & (pair < half)  # the part of the tile that exists

    # Yours, about ten lines. Load this token's position, then row `position` of both tables, as tiles [1, HALF].
    # Load tile a (features pair) and tile b (features half + pair) of all heads. Compute in float32:
    #     a' = a cos - b sin        b' = b cos + a sin
    # and store both into out, where a and b would lie. Mask every load and every store.
    ...


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Turn x `[..., num_heads, head_dim]`; features from 2 * half on stay as they are."""
    out = x.clone(memory_format=torch.contiguous_format)  # brings the features that do not turn
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
    """What the engine calls. Neighbouring pairs, and float64, are left to the reference."""
    if interleaved or q.dtype == torch.float64:
        return reference.apply_rotary_emb(q, k, cos, sin, position_ids, interleaved)
    return rotate(q, cos, sin, position_ids), rotate(k, cos, sin, position_ids)
