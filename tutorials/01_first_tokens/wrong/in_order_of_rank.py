HINT = {"en": "by rank instead of in the order", "zh": "按名次排列"}

import torch
from torch import Tensor


def sample_top_p(logits: Tensor, top_p: float, uniform: float) -> int:
    ranked, order = logits.double().softmax(dim=-1).sort(descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    cumulative = ranked.masked_fill(before >= top_p, 0).cumsum(dim=-1)
    return int(order[torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)])
