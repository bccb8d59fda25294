"""Log probabilities of tokens under the model, and how likely they were beside the others."""

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from mini_infer.outputs import Logprob, TokenLogprobs


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: Sequence[int], decode: Callable[[int], str]
) -> list[TokenLogprobs]:
    """What to report of R places.

    Args:
        logits: ``[R, vocab]``, of the model itself.
        token_ids: int64 ``[R]``, the token that is at each place.
        num_top: how many of the likeliest tokens to report beside it, for each place.
        decode: the text of one token.

    Returns:
        Per place the token that is there, then the likeliest ones in order.
    """
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    logprobs = logits.log_softmax(dim=-1, dtype=dtype)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(max(num_top, default=0), dim=-1)
    columns = (token_ids, chosen[:, 0], ranks, top.indices, top.values)
    places = []
    for num, (token_id, logprob, rank, ids, values) in zip(
        num_top, zip(*(column.tolist() for column in columns), strict=True), strict=True
    ):
        entries = {token_id: (logprob, rank)}
        for place, (likely_id, likely_logprob) in enumerate(islice(zip(ids, values, strict=True), num), start=1):
            entries.setdefault(likely_id, (likely_logprob, place))
        places.append({entry: Logprob(*values, decode(entry)) for entry, values in entries.items()})
    return places
