import torch
from torch import Tensor


def sample_top_p(logits: Tensor, top_p: float, uniform: float) -> int:
    probs = logits.double().softmax(dim=-1)
    ranked, order = probs.sort(descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    probs[order[before >= top_p]] = 0
    cumulative = probs.cumsum(dim=-1)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
