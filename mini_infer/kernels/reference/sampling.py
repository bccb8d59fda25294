"""The likeliest token; and a token drawn at random."""

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.host import Floats, Ints, send
from mini_infer.kernels.registry import REFERENCE, register

_SORTED = 512
"""Tokens that are sorted for `top_p` before all are, where `top_k` does not leave fewer."""


@register("argmax_logprob", backend=REFERENCE)
def argmax_logprob(logits: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, token_ids = wide.max(dim=-1)
    return token_ids, largest - wide.logsumexp(dim=-1)


@register("draw_tokens", backend=REFERENCE)
def draw_tokens(
    logits: Tensor, temperature: Floats, top_k: Ints, top_p: Floats, min_p: Floats, uniform: Floats
) -> Tensor:
    cumulative = filtered_weights(logits, temperature, top_k, top_p, min_p).to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that the token found always has a positive probability.
    target = torch.minimum(
        send(uniform, logits.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    # A row that is not a distribution (its logits are NaN) yields some token; its log probability tells.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def filtered_weights(logits: Tensor, temperature: Floats, top_k: Ints, top_p: Floats, min_p: Floats) -> Tensor:
    """What each row's probabilities are in proportion to, after temperature and filters; float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest logit, made finite, is moved to 0 first, so that no temperature makes inf - inf of it.
    logits = logits.clamp(max=torch.finfo(logits.dtype).max)
    logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(_column(temperature, logits))
    return _weights(logits, top_k, top_p, min_p)


def _column(parameter: Floats, like: Tensor) -> Tensor:
    """A parameter as a column `[R, 1]` of a tensor's dtype and device. A positive value stays positive and finite."""
    limits = torch.finfo(like.dtype)
    return send(np.where(parameter > 0, parameter.clip(limits.tiny, limits.max), parameter), like.device).to(
        like.dtype
    )[:, None]


def _weights(logits: Tensor, top_k: Ints, top_p: Floats, min_p: Floats) -> Tensor:
    """e^logits, and 0 where a filter drops a token. The logits are divided by the temperature, and the largest is 0."""
    num_tokens = logits.shape[-1]
    top_k = np.where((top_k > 0) & (top_k < num_tokens), top_k, num_tokens)
    has_top_k, has_top_p = bool((top_k < num_tokens).any()), bool((top_p < 1).any())
    weights = logits.exp()
    if has_top_k or (has_top_p and not logits.is_cuda):
        # One more than top_k leaves, which shows that these are all.
        ranked = _ranked(logits, int(np.where(top_k < num_tokens, top_k + 1, _SORTED).max()))
    if has_top_k:
        last = send(np.where(top_k < num_tokens, top_k - 1, 0), logits.device)
        everything = send(top_k == num_tokens, logits.device)
        threshold = ranked.gather(1, last[:, None]).masked_fill(everything[:, None], -torch.inf)
        weights.masked_fill_(logits < threshold, 0)
        ranked = ranked.masked_fill(ranked < threshold, -torch.inf)
    if has_top_p:
        share = _column(top_p, logits).clamp(min=torch.finfo(logits.dtype).tiny)  # 0: the likeliest token
        weights = _keep_top_p_unasked(weights, share) if logits.is_cuda else _keep_top_p(weights, share, ranked.exp())
    if (min_p > 0).any():
        threshold = weights.amax(dim=-1, keepdim=True) * _column(min_p, logits)
        weights = weights.masked_fill(weights < threshold, 0)
    return weights


def _ranked(numbers: Tensor, count: int) -> Tensor:
    """The largest numbers of each row, at most `count` of them, in descending order."""
    width = numbers.shape[-1]
    if width > _SORTED or numbers.is_cuda:
        return numbers.topk(min(count, width), dim=-1).values
    ascending = torch.from_numpy(np.sort(numbers.numpy(), axis=-1))  # of so few, ten times as fast as topk
    return ascending.flip(-1)[:, :count]


def _keep_top_p(weights: Tensor, top_p: Tensor, ranked: Tensor) -> Tensor:
    """0 for all but the likeliest tokens that together reach `top_p`; of equals, the first of the vocabulary stay.

    Args:
        weights: `[S, V]`, what probabilities are in proportion to.
        top_p: `[S, 1]`.
        ranked: the largest weights, `[S, C]`. Only if in some row these do not reach `top_p`, all are sorted.
    """
    enough = top_p * weights.sum(dim=-1, keepdim=True)
    while True:
        before = ranked.cumsum(dim=-1) - ranked
        stays = (before < enough) | (top_p >= 1)  # a token stays while those before it have not reached top_p
        if ranked.shape == weights.shape or not bool((stays[:, -1:] & (top_p < 1)).any()):
            break
        ranked = _ranked(weights, weights.shape[-1])
    num_left = stays.sum(dim=-1, keepdim=True).clamp(min=1)  # of a row of NaN, say
    least = ranked.gather(1, num_left - 1)
    dropped = weights < least
    if bool(((~dropped).sum(dim=-1, keepdim=True) > num_left).any()):  # more are as likely as the last that stays
        equal = weights == least
        num_equal = num_left - (weights > least).sum(dim=-1, keepdim=True)
        dropped |= equal & (equal.cumsum(dim=-1) > num_equal)
    return weights.masked_fill(dropped & (top_p < 1), 0)


def _keep_top_p_unasked(weights: Tensor, top_p: Tensor) -> Tensor:
    """The same without a question to the device: the largest threshold whose tokens reach `top_p`, by bisection.

    Positive floats are in the order of their bits read as integers, so halving that interval ends at the threshold
    itself. Of tokens that are equally likely, all stay.
    """
    enough = top_p * weights.sum(dim=-1, keepdim=True)
    integer, num_bits = (torch.int64, 63) if weights.dtype is torch.float64 else (torch.int32, 31)
    low = torch.zeros_like(top_p).view(integer)  # reaches top_p, or nothing does
    high = torch.full_like(top_p, 2.0).view(integer)  # does not
    for _ in range(num_bits):
        middle = low + (high - low) // 2
        reached = (weights * (weights >= middle.view(weights.dtype))).sum(dim=-1, keepdim=True) >= enough
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return weights.masked_fill((weights < low.view(weights.dtype)) & (top_p < 1), 0)
