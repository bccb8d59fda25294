HINT = {"en": "rank instead of its id", "zh": "返回了名次"}

import torch
from torch import Tensor


def sample_top_p(logits: Tensor, top_p: float, uniform: float) -> int:
    ranked = logits.double().softmax(dim=-1).sort(descending=True).values
    before = ranked.cumsum(dim=-1) - ranked
    cumulative = ranked.masked_fill(before >= top_p, 0).cumsum(dim=-1)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
