"""Rotary position embedding, alone and after the normalisation of queries and keys."""

import torch
from torch import Tensor

from mini_infer.kernels.reference.norm import rmsnorm
from mini_infer.kernels.registry import REFERENCE, register


@register("apply_rotary_emb", backend=REFERENCE)
def apply_rotary_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[position_ids].unsqueeze(-2), sin[position_ids].unsqueeze(-2)  # the same for every head
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


@register("qk_norm_rope", backend=REFERENCE)
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
    q, k = rmsnorm(q, q_weight, eps), rmsnorm(k, k_weight, eps)
    return apply_rotary_emb(q, k, cos, sin, position_ids, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    wide = x[..., :rotary_dim].to(torch.promote_types(x.dtype, torch.float32))
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), dim=-1)
