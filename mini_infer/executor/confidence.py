"""How sure a model is of a token, in the three ways in which Dream ranks what it writes.

They are about the distribution that the token is drawn from, after temperature and filters:

    probability    p(token)
    margin         p of the likeliest token less p of the next
    entropy        Σ p log p, which is highest where one token has it all

Ye et al., Dream 7B: Diffusion Large Language Models, 2025, https://arxiv.org/abs/2508.15487
"""

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.host import send
from mini_infer.kernels.reference.sampling import filtered_weights
from mini_infer.step import CONFIDENCES, Draws


def confidences(logits: Tensor, draws: Draws, token_ids: Tensor) -> Tensor:
    """``[D]``; 0 for draws that asked for none.

    Args:
        logits: ``[D, vocab]``.
        token_ids: int64 ``[D]``, what was drawn.
    """
    found = torch.zeros(len(draws), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    for number, name in enumerate(CONFIDENCES):
        asking = np.flatnonzero(draws.confidences == number)
        if not len(asking):
            continue
        rows = send(asking, logits.device)
        temperature = np.where(draws.temperature > 0, draws.temperature, 1.0)[asking]
        filters = draws.top_k[asking], draws.top_p[asking], draws.min_p[asking]
        weights = filtered_weights(logits[rows], temperature, *filters)
        shares = weights / weights.sum(dim=-1, keepdim=True)
        if name == "probability":
            some = shares.gather(1, token_ids[rows][:, None])[:, 0]
        elif name == "margin":
            first, second = shares.topk(2, dim=-1).values.unbind(-1)
            some = first - second
        else:
            some = -torch.special.entr(shares).sum(-1)
        found[rows] = some
    return found
