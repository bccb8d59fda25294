"""The likeliest token."""

import torch
from torch import Tensor

from mini_infer.kernels.registry import REFERENCE, register


@register("argmax_logprob", backend=REFERENCE)
def argmax_logprob(logits: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, token_ids = wide.max(dim=-1)
    return token_ids, largest - wide.logsumexp(dim=-1)
