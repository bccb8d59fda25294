HINT = {"en": "stride", "zh": "步长"}

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
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (pair < half)

    position = tl.load(positions + token).to(tl.int64)
    cosines = tl.load(cos + position * half + pair, pair < half, other=0.0).to(tl.float32)
    sines = tl.load(sin + position * half + pair, pair < half, other=0.0).to(tl.float32)
    source = x + (token * num_heads + head) * head_dim + pair
    a = tl.load(source, inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, inside, other=0.0).to(tl.float32)
    target = out + (token * num_heads + head) * head_dim + pair
    tl.store(target, a * cosines - b * sines, inside)
    tl.store(target + half, b * cosines + a * sines, inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
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
    if interleaved or q.dtype == torch.float64:
        return reference.apply_rotary_emb(q, k, cos, sin, position_ids, interleaved)
    return rotate(q, cos, sin, position_ids), rotate(k, cos, sin, position_ids)
