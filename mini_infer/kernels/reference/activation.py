"""SwiGLU's gate."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from mini_infer.kernels.registry import REFERENCE, register


@register("silu_and_mul", backend=REFERENCE)
def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    activated = silu(gate.to(torch.promote_types(x.dtype, torch.float32)))
    return activated.to(x.dtype) * up  # rounded between the two, as transformers does
