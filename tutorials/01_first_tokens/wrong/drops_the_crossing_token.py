HINT = {"en": "crosses p", "zh": "跨过 p"}

import torch
from torch import Tensor


def sample_top_p(logits: Tensor, top_p: float, uniform: float) -> int:
    probs = logits.double().softmax(dim=-1)
    ranked, order = probs.sort(descending=True)
    kept = ranked.cumsum(dim=-1) <= top_p + 1e-12
    probs[order[~kept]] = 0
    cumulative = probs.cumsum(dim=-1)
    found = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return int(found.clamp(max=len(probs) - 1))
