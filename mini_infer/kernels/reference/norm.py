"""RMSNorm, alone and fused with the residual addition before it."""

import torch
from torch import Tensor

from mini_infer.kernels.registry import REFERENCE, register


@register("rmsnorm", backend=REFERENCE)
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # Llama was trained with this rounding: back to the model's dtype first, then times the weight. A single rounding
    # at the end would be more accurate and would differ from transformers in the last bit of bfloat16.
    return weight * normed.to(x.dtype)


@register("add_rmsnorm", backend=REFERENCE)
def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # The norm sees the sum as the next layer will see it: already rounded to the model's dtype.
    total = x + residual
    return rmsnorm(total, weight, eps), total
