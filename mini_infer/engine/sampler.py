"""Logits to tokens, for the whole batch at once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mini_infer import kernels
from mini_infer.engine.device import send
from mini_infer.engine.random import uniforms
from mini_infer.engine.request import Completion
from mini_infer.sampling import SamplingParams
from mini_infer.typing import TokenIds

_GROUP = 64
"""Neighbours in the vocabulary that are looked at together for the largest logits."""

_SHARE = 2
"""That pays where the tokens looked at are at most the vocabulary divided by this."""

_SORTED = 512
"""Tokens that are sorted for ``top_p`` before all are, where ``top_k`` does not leave fewer."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What decides the next token of a completion, beside its logits; the completion itself may move on meanwhile.

    Attributes:
        params: its request's sampling parameters.
        seed, index, position: the request's seed, which of its completions this is, and which token of the sequence is
            drawn; together the key of the random number.
        banned: tokens that it must not sample yet.
        token_ids: the sequence so far; only penalties read it.
        num_prompt_tokens: how many of them are the prompt.
    """

    params: SamplingParams
    seed: int
    index: int
    position: int
    banned: Collection[int]
    token_ids: TokenIds
    num_prompt_tokens: int

    @classmethod
    def of(cls, completion: Completion) -> "Draw":
        sequence = completion.sequence
        return cls(
            params=completion.params,
            seed=completion.seed,
            index=completion.index,
            position=len(sequence),
            banned=sequence.stop_token_ids if len(sequence) < sequence.min_length else (),
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
        )


def sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """The next token of each sequence. On a GPU the host waits for nothing here.

    Args:
        logits: ``[S, vocab]``, any float dtype; computed on in float32 or wider.
        draws: what is to be drawn from each row, ``[S]``.

    Returns:
        Token ids int64 ``[S]``, and their log probabilities under the model itself (before penalties, temperature and
        filters) ``[S]``.
    """
    raw_ids, raw_logprobs = kernels.argmax_logprob(logits)
    if all(_is_plain(draw) for draw in draws):
        return raw_ids, raw_logprobs
    adjusted = _adjust(logits, draws)
    token_ids = raw_ids if adjusted is logits else adjusted.argmax(dim=-1)
    drawing = [row for row, draw in enumerate(draws) if not draw.params.greedy]
    if len(drawing) == len(draws):  # then no row needs to be copied
        token_ids = _draw(adjusted, draws)
    elif drawing:
        rows = send(torch.tensor(drawing), logits.device)
        chosen = _draw(adjusted[rows], [draws[row] for row in drawing])
        token_ids = token_ids.index_copy(0, rows, chosen)
    # logprob(a) - logprob(b) = logit(a) - logit(b): the sum over the vocabulary is made once.
    chosen_logits, largest = (_wide(logits.gather(1, ids[:, None])[:, 0]) for ids in (token_ids, raw_ids))
    behind = torch.where(token_ids == raw_ids, 0, chosen_logits - largest)  # 0 for inf - inf, too
    return token_ids, raw_logprobs + behind


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _is_plain(draw: Draw) -> bool:
    """Whether its token is simply the likeliest one."""
    return draw.params.greedy and not draw.params.has_penalties and not _biases(draw)


def _adjust(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits after penalties, biases and the ban on stopping early; the very same tensor if there are none."""
    penalised = [row for row, draw in enumerate(draws) if draw.params.has_penalties]
    edits: dict[tuple[int, int], float] = {}
    for row, draw in enumerate(draws):
        for token_id, bias in _biases(draw):
            edits[row, token_id] = edits.get((row, token_id), 0.0) + bias
    if not penalised and not edits:
        return logits
    logits = logits.clone() if logits.dtype is torch.float64 else logits.to(torch.float32, copy=True)
    if penalised:
        at = send(torch.tensor(penalised), logits.device)
        logits[at] = _penalise(logits[at], [draws[row] for row in penalised])
    if edits:
        rows, ids = send(torch.tensor(list(edits)), logits.device).unbind(1)
        logits[rows, ids] += send(torch.tensor(list(edits.values()), dtype=logits.dtype), logits.device)
    return logits


def _biases(draw: Draw) -> list[tuple[int, float]]:
    """What to add to which logits of one sequence: its ``logit_bias``, and no end before ``min_tokens``."""
    return [*(draw.params.logit_bias or {}).items(), *((token_id, -torch.inf) for token_id in draw.banned)]


def _penalise(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Repetition penalty over prompt and generated tokens (Keskar et al., "CTRL", 2019); presence and frequency
    penalties over the generated ones (as the OpenAI API defines them)."""
    generated = _count([draw.token_ids[draw.num_prompt_tokens :] for draw in draws], logits)
    seen = _count([draw.token_ids for draw in draws], logits) > 0
    repetition = _column(draws, "repetition_penalty", logits)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, repeated, logits)
    presence = _column(draws, "presence_penalty", logits)
    frequency = _column(draws, "frequency_penalty", logits)
    return logits - presence * (generated > 0) - frequency * generated


def _count(token_ids: Sequence[list[int]], like: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs in each row; shape and dtype of ``like``, ``[S, vocab]``."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    rows = torch.repeat_interleave(torch.arange(len(token_ids)), lengths).to(like.device)
    flat = torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])).to(like.device)
    ones = torch.ones((), dtype=like.dtype, device=like.device).expand(len(flat))
    return torch.zeros_like(like).index_put_((rows, flat), ones, accumulate=True)


def _draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token per row, drawn from the filtered distribution by inverting its cumulative sum."""
    params = [draw.params for draw in draws]
    # How many are left in `_likeliest` the host must ask for, which on a GPU costs more than it saves.
    most = 0 if logits.is_cuda else logits.shape[-1] // _SHARE
    has_few = [0 < p.top_k * _GROUP <= most for p in params]
    if not any(has_few):
        return _invert(_wide(logits), draws)
    token_ids = torch.empty(len(params), dtype=torch.int64)
    for reduced in (True, False):
        rows = [row for row, few in enumerate(has_few) if few is reduced]
        if not rows:
            continue
        some = logits if len(rows) == len(params) else logits[rows]
        chosen = [draws[row] for row in rows]
        if reduced:
            some, ids = _likeliest(some, max(params[row].top_k for row in rows))
            token_ids[rows] = ids.gather(1, _invert(_wide(some), chosen)[:, None])[:, 0]
        else:
            token_ids[rows] = _invert(_wide(some), chosen)
    return token_ids


def _likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and all that equal the k-th, and which tokens they are, in order of the tokens.

    The k largest lie in the k groups of neighbours whose own largest is largest, which leaves few numbers to sort.

    Returns:
        Logits ``[S, C]``, rows with fewer of them filled up with -inf, and token ids ``[S, C]``.
    """
    num_groups = -(-logits.shape[-1] // _GROUP)
    missing = num_groups * _GROUP - logits.shape[-1]
    padded = functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
    groups = padded.reshape(len(logits), num_groups, _GROUP)
    largest = groups.amax(dim=-1)
    best = largest.topk(min(k, num_groups), dim=-1).indices
    among = groups.gather(1, best[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    threshold = among.topk(k, dim=-1).values[:, -1:]
    # Not below, rather than at least: a row with NaN keeps all. In order; ties may be in further groups.
    row, group = (~(largest < threshold)).nonzero(as_tuple=True)
    inside = groups[row, group]
    inside_vocabulary = group[:, None] * _GROUP + torch.arange(_GROUP, device=group.device) < logits.shape[-1]
    which, offset = (~(inside < threshold[row]) & inside_vocabulary).nonzero(as_tuple=True)
    row, ids = row[which], group[which] * _GROUP + offset
    counts = torch.bincount(row, minlength=len(logits))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    kept = torch.full((len(logits), int(counts.max())), -torch.inf, dtype=logits.dtype, device=logits.device)
    kept_ids = torch.zeros(kept.shape, dtype=torch.int64, device=logits.device)
    kept[row, place], kept_ids[row, place] = inside[which, offset], ids
    return kept, kept_ids


def _invert(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Where in each row the completion's own random number falls; ``[S]``."""
    # The largest logit, made finite, is moved to 0 first, so that no temperature makes inf - inf of it.
    logits = logits.clamp(max=torch.finfo(logits.dtype).max)
    logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(_column(draws, "temperature", logits))
    cumulative = _weights(logits, draws).to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    keys = [(draw.seed, draw.index, draw.position) for draw in draws]
    uniform = send(torch.from_numpy(uniforms(*zip(*keys, strict=True))), logits.device)[:, None]
    # Below the total even after rounding, so that the token found always has a positive probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # A row that is not a distribution (its logits are NaN) yields some token; its log probability tells.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _weights(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """e^logits, and 0 where ``top_k``, ``top_p`` or ``min_p`` drop a token. Tokens as likely as the k-th all stay.

    Args:
        logits: divided by the temperature; the largest of each row is 0.
        draws: whose rows they are.
    """
    params = [draw.params for draw in draws]
    num_tokens = logits.shape[-1]
    top_k = [min(p.top_k, num_tokens) if p.top_k > 0 else num_tokens for p in params]
    has_top_k, has_top_p = min(top_k) < num_tokens, any(p.top_p < 1 for p in params)
    weights = logits.exp()
    if has_top_k or has_top_p:
        # One more than top_k leaves, which shows that these are all.
        ranked = _ranked(logits, max(k + 1 if k < num_tokens else _SORTED for k in top_k))
    if has_top_k:
        last = send(torch.tensor([k - 1 if k < num_tokens else 0 for k in top_k]), logits.device)
        everything = send(torch.tensor([k == num_tokens for k in top_k]), logits.device)
        threshold = ranked.gather(1, last[:, None]).masked_fill(everything[:, None], -torch.inf)
        weights.masked_fill_(logits < threshold, 0)
        ranked = ranked.masked_fill(ranked < threshold, -torch.inf)
    if has_top_p:
        top_p = _column(draws, "top_p", logits).clamp(min=torch.finfo(logits.dtype).tiny)  # 0: the likeliest token
        weights = _keep_top_p_unasked(weights, top_p) if logits.is_cuda else _keep_top_p(weights, top_p, ranked.exp())
    if any(p.min_p > 0 for p in params):
        threshold = weights.amax(dim=-1, keepdim=True) * _column(draws, "min_p", logits)
        weights = weights.masked_fill(weights < threshold, 0)
    return weights


def _ranked(numbers: Tensor, count: int) -> Tensor:
    """The largest numbers of each row, at most ``count`` of them, in descending order."""
    width = numbers.shape[-1]
    if width > _SORTED or numbers.is_cuda:
        return numbers.topk(min(count, width), dim=-1).values
    ascending = torch.from_numpy(np.sort(numbers.numpy(), axis=-1))  # of so few, ten times as fast as topk
    return ascending.flip(-1)[:, :count]


def _keep_top_p(weights: Tensor, top_p: Tensor, ranked: Tensor) -> Tensor:
    """0 for all but the likeliest tokens that together reach ``top_p``; of equals, the first of the vocabulary stay.

    Args:
        weights: ``[S, V]``, what probabilities are in proportion to.
        top_p: ``[S, 1]``.
        ranked: the largest weights, ``[S, C]``. Only if in some row these do not reach ``top_p``, all are sorted.
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
    """The same without a question to the device: the largest threshold whose tokens reach ``top_p``, by bisection.

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


def _column(draws: Sequence[Draw], name: str, like: Tensor) -> Tensor:
    """A sampling parameter of each sequence as a column ``[S, 1]`` of a tensor's dtype and device.

    A positive value stays positive and finite there, however extreme.
    """
    limits = torch.finfo(like.dtype)
    column = torch.tensor([getattr(draw.params, name) for draw in draws], dtype=torch.float64)
    column = torch.where(column > 0, column.clamp(limits.tiny, limits.max), column)
    return send(column.to(like.dtype), like.device)[:, None]
