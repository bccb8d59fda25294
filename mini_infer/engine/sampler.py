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
"""A ``top_k`` above the vocabulary divided by this leaves too much for that to pay."""

_SORTED = 512
"""Tokens that are sorted for ``top_p`` before all are."""


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
    if drawing:
        everyone = len(drawing) == len(draws)  # then no row needs to be copied
        rows = send(torch.tensor(drawing), logits.device)
        chosen = _draw(adjusted if everyone else adjusted[rows], [draws[row] for row in drawing])
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
    vocab_size = logits.shape[-1]
    token_ids = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    # How many are left in `_likeliest` the host must ask for, which on a GPU costs more than it saves.
    has_few = [0 < p.top_k <= vocab_size // _SHARE and not logits.is_cuda for p in params]
    few = [row for row, reduced in enumerate(has_few) if reduced]
    many = [row for row, reduced in enumerate(has_few) if not reduced]
    for rows in (few, many):
        if not rows:
            continue
        at = send(torch.tensor(rows), logits.device)
        some = logits if len(rows) == len(params) else logits[at]
        chosen = [draws[row] for row in rows]
        if rows is few:
            some, ids = _likeliest(some, max(params[row].top_k for row in rows))
            token_ids[at] = ids.gather(1, _invert(_wide(some), chosen)[:, None])[:, 0]
        else:
            token_ids[at] = _invert(_wide(some), chosen)
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
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / _column(draws, "temperature", logits)
    probs = _filter(logits, draws).softmax(dim=-1)
    cumulative = probs.to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    keys = [(draw.seed, draw.index, draw.position) for draw in draws]
    uniform = send(torch.from_numpy(uniforms(*zip(*keys, strict=True))), logits.device)[:, None]
    # Below the total even after rounding, so that the token found always has a positive probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # A row that is not a distribution (its logits are NaN) yields some token; its log probability tells.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _filter(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits with -inf where ``top_k``, ``top_p`` or ``min_p`` drop a token. Tokens as likely as the k-th all stay."""
    params = [draw.params for draw in draws]
    num_tokens = logits.shape[-1]
    if any(0 < p.top_k < num_tokens for p in params):
        kept = [min(p.top_k, num_tokens) if p.top_k > 0 else num_tokens for p in params]
        largest_k = max(k for k in kept if k < num_tokens)
        top = logits.topk(largest_k, dim=-1).values
        last = send(torch.tensor([min(k, largest_k) - 1 for k in kept]), logits.device)
        threshold = top.gather(1, last[:, None])
        everything = send(torch.tensor([k == num_tokens for k in kept]), logits.device)
        logits = logits.masked_fill(logits < threshold.masked_fill(everything[:, None], -torch.inf), -torch.inf)
    if any(p.top_p < 1 for p in params):
        keep_top_p = _keep_top_p_unasked if logits.is_cuda else _keep_top_p
        logits = keep_top_p(logits, _column(draws, "top_p", logits))
    if any(p.min_p > 0 for p in params):
        threshold = logits.amax(dim=-1, keepdim=True) + _column(draws, "min_p", logits).log()
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """-inf for all but the likeliest tokens that together reach ``top_p`` ``[S, 1]``.

    The few likeliest are sorted first; only if in some row they do not reach it, the whole vocabulary is.
    """
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    for num_sorted in (min(_SORTED, logits.shape[-1]), logits.shape[-1]):
        ranked, order = logits.topk(num_sorted, dim=-1)
        probs = (ranked - normaliser).exp()
        before = probs.cumsum(dim=-1) - probs  # a token stays while those before it have not reached top_p
        dropped = (before >= top_p) & (top_p < 1)
        if num_sorted == logits.shape[-1] or bool((dropped[:, -1:] | (top_p >= 1)).all()):
            break
    stays = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter(1, order, ~dropped)
    return logits.masked_fill(~stays & (top_p < 1), -torch.inf)


def _keep_top_p_unasked(logits: Tensor, top_p: Tensor) -> Tensor:
    """The same without a question to the device: the largest threshold whose tokens reach ``top_p``, by bisection.

    Positive floats are in the order of their bits read as integers, so halving that interval ends at the threshold
    itself. Of tokens that are equally likely, all stay.
    """
    probs = logits.softmax(dim=-1)
    integer, num_bits = (torch.int64, 63) if probs.dtype is torch.float64 else (torch.int32, 31)
    low = torch.zeros_like(top_p).view(integer)  # reaches top_p, or nothing does
    high = torch.full_like(top_p, 2.0).view(integer)  # does not
    for _ in range(num_bits):
        middle = low + (high - low) // 2
        reached = (probs * (probs >= middle.view(probs.dtype))).sum(dim=-1, keepdim=True) >= top_p
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return logits.masked_fill((probs < low.view(probs.dtype)) & (top_p < 1), -torch.inf)


def _column(draws: Sequence[Draw], name: str, like: Tensor) -> Tensor:
    """A sampling parameter of each sequence as a column ``[S, 1]`` of a tensor's dtype and device.

    A positive value stays positive and finite there, however extreme.
    """
    limits = torch.finfo(like.dtype)
    column = torch.tensor([getattr(draw.params, name) for draw in draws], dtype=torch.float64)
    column = torch.where(column > 0, column.clamp(limits.tiny, limits.max), column)
    return send(column.to(like.dtype), like.device)[:, None]
