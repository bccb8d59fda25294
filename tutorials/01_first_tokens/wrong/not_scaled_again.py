HINT = {"en": "Without scaling", "zh": "忘了放大"}

import torch
from torch import Tensor


def sample_top_p(logits: Tensor, top_p: float, uniform: float) -> int:
    probs = logits.double().softmax(dim=-1)
    ranked, order = probs.sort(descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    probs[order[before >= top_p]] = 0
    found = torch.searchsorted(probs.cumsum(dim=-1), uniform, right=True)
    return int(found) if found < len(probs) else int(probs.argmax())
