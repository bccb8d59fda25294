"""Log probabilities of tokens under the model, and how likely they were beside the others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mini_infer.step import TokenScore


class ScoreTensors(NamedTuple):
    """What is known of R rows: log probability and rank of one token each, ids and log probabilities of the likeliest.

    Attributes:
        logprobs, ranks: ``[R]``.
        top_ids, top_logprobs: ``[R, K]``.
    """

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def to_scores(self, num_top: list[int]) -> list[TokenScore]:
        """As plain numbers; ``num_top`` of the likeliest for each row."""
        columns = zip(num_top, *(tensor.tolist() for tensor in self), strict=True)
        return [
            TokenScore(logprob, rank, tuple(ids[:num]), tuple(values[:num]))
            for num, logprob, rank, ids, values in columns
        ]


def stacked(parts: Sequence[ScoreTensors]) -> ScoreTensors:
    """The rows of all of them, which report equally many of the likeliest tokens."""
    return ScoreTensors(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def score_tokens(logits: Tensor, token_ids: Tensor, most: int) -> ScoreTensors:
    """Scores of one token for each row, and the ``most`` likeliest.

    Args:
        logits: ``[R, vocab]``, of the model itself.
        token_ids: int64 ``[R]``; where one is negative, its log probability and rank mean nothing.
        most: at most the vocabulary is reported.
    """
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    logprobs = logits.log_softmax(dim=-1, dtype=dtype)
    chosen = logprobs.gather(1, token_ids.clamp(min=0)[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    return ScoreTensors(chosen[:, 0], ranks, top.indices, top.values)
