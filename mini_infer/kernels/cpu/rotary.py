"""Rotary position embedding, alone and after the normalisation of queries and keys.

    a', b' = a cos - b sin, b cos + a sin        for the pair (a, b) of a head's features, at its token's angle

A task is one token with all its heads: they share one row of the tables. Queries and keys are read where the fused
projection left them, side by side in one row, so nothing is copied first.

Bytes: q and k in and out, and one row of each table per token. Floor: bytes / memory bandwidth.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu.jit import (
    ELEMENTS,
    FIRST,
    Kernel,
    as_float,
    float_bits,
    kernel,
    load,
    pointer,
    register_fast,
    rounded,
    store,
    tasks,
)
from mini_infer.kernels.reference import rotary as reference


@register_fast("apply_rotary_emb", reference.apply_rotary_emb)
def apply_rotary_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _run(q, k, None, None, cos, sin, position_ids, 0.0, interleaved)


@register_fast("qk_norm_rope", reference.qk_norm_rope)
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
    return _run(q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, position_ids, eps, interleaved)


def _run(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads = k.shape[-2]
    flat_q, flat_k = _by_token(q), _by_token(k)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    positions = position_ids.reshape(-1).to(torch.int64).contiguous()
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    _kernel(ELEMENTS[q.dtype], q_weight is not None, interleaved, head_dim, 2 * cos.shape[1])(
        len(positions) if head_dim else 0,
        flat_q.data_ptr(),
        flat_k.data_ptr(),
        q_out.data_ptr(),
        k_out.data_ptr(),
        0 if q_weight is None else q_weight.data_ptr(),
        0 if k_weight is None else k_weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr(),
        num_heads,
        num_kv_heads,
        flat_q.stride(0),
        flat_q.stride(1),
        flat_k.stride(0),
        flat_k.stride(1),
        float_bits(eps),
        work=2 * (q.numel() + k.numel()),
    )
    return q_out, k_out


def _by_token(x: Tensor) -> Tensor:
    """x as ``[num_tokens, num_heads, head_dim]`` whose last dimension is contiguous; a view where it can be."""
    flat = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@functools.cache
def _kernel(element: type, norms: bool, interleaved: bool, head_dim: int, rotary_dim: int) -> Kernel:
    half = rotary_dim // 2
    step, apart = (2, 1) if interleaved else (1, half)  # pair i is features (step * i, step * i + apart)

    @kernel
    def rotary(args):
        cos, sin = pointer(args[FIRST + 6], np.float32), pointer(args[FIRST + 7], np.float32)
        positions = pointer(args[FIRST + 8], np.int64)
        eps = as_float(args[FIRST + 15])
        for token in tasks(args):
            angles = positions[token] * half
            for which in range(2):  # queries, then keys
                x, out = pointer(args[FIRST + which], element), pointer(args[FIRST + 2 + which], element)
                weight = pointer(args[FIRST + 4 + which], element)
                num_heads = args[FIRST + 9 + which]
                token_stride, head_stride = args[FIRST + 11 + 2 * which], args[FIRST + 12 + 2 * which]
                for head in range(num_heads):
                    at = token * token_stride + head * head_stride
                    to = (token * num_heads + head) * head_dim
                    scale = np.float32(1)
                    if norms:
                        squares = np.float32(0)
                        for i in range(head_dim):
                            squares += load(x, at + i) * load(x, at + i)
                        scale = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + eps)
                    for i in range(half):
                        first, second = step * i, step * i + apart
                        a, b = load(x, at + first), load(x, at + second)
                        if norms:
                            a = rounded(x, rounded(x, a * scale) * load(weight, first))
                            b = rounded(x, rounded(x, b * scale) * load(weight, second))
                        c, s = load(cos, angles + i), load(sin, angles + i)
                        store(out, to + first, a * c - b * s)
                        store(out, to + second, b * c + a * s)
                    for i in range(rotary_dim, head_dim):
                        a = load(x, at + i)
                        if norms:
                            a = rounded(x, a * scale) * load(weight, i)
                        store(out, to + i, a)

    return rotary
