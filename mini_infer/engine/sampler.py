"""Logits to tokens, for the whole batch at once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mini_infer import kernels
from mini_infer.engine.random import uniforms
from mini_infer.engine.request import Completion
from mini_infer.sampling import SamplingParams

_GROUP = 64
"""Neighbours in the vocabulary that are looked at together for the largest logits."""

_SHARE = 2
"""A ``top_k`` above the vocabulary divided by this leaves too much for that to pay."""

_SORTED = 512
"""Tokens that are sorted for ``top_p`` before all are."""


def sample(logits: Tensor, completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """The next token of each sequence.

    Args:
        logits: ``[S, vocab]``, any float dtype; computed on in float32 or wider.
        completions: whose logits they are, ``[S]``.

    Returns:
        Token ids int64 ``[S]``, and their log probabilities under the model itself (before penalties, temperature and
        filters) ``[S]``.
    """
    raw_ids, raw_logprobs = kernels.argmax_logprob(logits)
    if all(_is_plain(completion) for completion in completions):
        return raw_ids, raw_logprobs
    adjusted = _adjust(logits, completions)
    token_ids = raw_ids if adjusted is logits else adjusted.argmax(dim=-1)
    drawing = [row for row, completion in enumerate(completions) if not completion.params.greedy]
    if drawing:
        everyone = len(drawing) == len(completions)  # then no row needs to be copied
        rows = torch.tensor(drawing, device=logits.device)
        chosen = _draw(adjusted if everyone else adjusted[rows], [completions[row] for row in drawing])
        token_ids = token_ids.index_copy(0, rows, chosen)
    # logprob(a) - logprob(b) = logit(a) - logit(b): the sum over the vocabulary is made once.
    chosen_logits, largest = (_wide(logits.gather(1, ids[:, None])[:, 0]) for ids in (token_ids, raw_ids))
    behind = torch.where(token_ids == raw_ids, 0, chosen_logits - largest)  # 0 for inf - inf, too
    return token_ids, raw_logprobs + behind


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _is_plain(completion: Completion) -> bool:
    """Whether its token is simply the likeliest one."""
    return completion.params.greedy and not _has_penalties(completion.params) and not _biases(completion)


def _adjust(logits: Tensor, completions: Sequence[Completion]) -> Tensor:
    """The logits after penalties, biases and the ban on stopping early; the very same tensor if there are none."""
    penalised = [row for row, completion in enumerate(completions) if _has_penalties(completion.params)]
    edits = [
        (row, token_id, bias) for row, completion in enumerate(completions) for token_id, bias in _biases(completion)
    ]
    if not penalised and not edits:
        return logits
    logits = logits.clone() if logits.dtype is torch.float64 else logits.to(torch.float32, copy=True)
    if penalised:
        at = torch.tensor(penalised, device=logits.device)
        logits[at] = _penalise(logits[at], [completions[row] for row in penalised])
    if edits:
        rows, ids, biases = zip(*edits, strict=True)
        places = (torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device))
        logits.index_put_(places, torch.tensor(biases, dtype=logits.dtype, device=logits.device), accumulate=True)
    return logits


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _biases(completion: Completion) -> list[tuple[int, float]]:
    """What to add to which logits of one sequence: its ``logit_bias``, and no end before ``min_tokens``."""
    biases = list((completion.params.logit_bias or {}).items())
    sequence = completion.sequence
    if len(sequence) < sequence.min_length:
        biases += [(token_id, -torch.inf) for token_id in sequence.stop_token_ids]
    return biases


def _penalise(logits: Tensor, completions: Sequence[Completion]) -> Tensor:
    """Repetition penalty over prompt and generated tokens (Keskar et al., "CTRL", 2019); presence and frequency
    penalties over the generated ones (as the OpenAI API defines them)."""
    sequences = [completion.sequence for completion in completions]
    generated = _count([sequence.generated_token_ids for sequence in sequences], logits)
    seen = _count([sequence.token_ids for sequence in sequences], logits) > 0
    repetition = _column(completions, "repetition_penalty", logits)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, repeated, logits)
    presence = _column(completions, "presence_penalty", logits)
    frequency = _column(completions, "frequency_penalty", logits)
    return logits - presence * (generated > 0) - frequency * generated


def _count(token_ids: Sequence[list[int]], like: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs in each row; shape and dtype of ``like``, ``[S, vocab]``."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    rows = torch.repeat_interleave(torch.arange(len(token_ids)), lengths).to(like.device)
    flat = torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])).to(like.device)
    ones = torch.ones((), dtype=like.dtype, device=like.device).expand(len(flat))
    return torch.zeros_like(like).index_put_((rows, flat), ones, accumulate=True)


def _draw(logits: Tensor, completions: Sequence[Completion]) -> Tensor:
    """One token per row, drawn from the filtered distribution by inverting its cumulative sum."""
    params = [completion.params for completion in completions]
    vocab_size = logits.shape[-1]
    token_ids = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    has_few = [0 < p.top_k <= vocab_size // _SHARE for p in params]
    few = [row for row, reduced in enumerate(has_few) if reduced]
    many = [row for row, reduced in enumerate(has_few) if not reduced]
    for rows in (few, many):
        if not rows:
            continue
        at = torch.tensor(rows, device=logits.device)
        some = logits if len(rows) == len(params) else logits[at]
        chosen = [completions[row] for row in rows]
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


def _invert(logits: Tensor, completions: Sequence[Completion]) -> Tensor:
    """Where in each row the completion's own random number falls; ``[S]``."""
    # The largest logit, made finite, is moved to 0 first, so that no temperature makes inf - inf of it.
    logits = logits.clamp(max=torch.finfo(logits.dtype).max)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / _column(completions, "temperature", logits)
    probs = _filter(logits, completions).softmax(dim=-1)
    cumulative = probs.to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    keys = [(completion.seed, completion.index, len(completion.sequence)) for completion in completions]
    uniform = torch.from_numpy(uniforms(*zip(*keys, strict=True))).to(logits.device)[:, None]
    # Below the total even after rounding, so that the token found always has a positive probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # A row that is not a distribution (its logits are NaN) yields some token; its log probability tells.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _filter(logits: Tensor, completions: Sequence[Completion]) -> Tensor:
    """Logits with -inf where ``top_k``, ``top_p`` or ``min_p`` drop a token. Tokens as likely as the k-th all stay."""
    params = [completion.params for completion in completions]
    num_tokens = logits.shape[-1]
    if any(0 < p.top_k < num_tokens for p in params):
        kept = [min(p.top_k, num_tokens) if p.top_k > 0 else num_tokens for p in params]
        largest_k = max(k for k in kept if k < num_tokens)
        top = logits.topk(largest_k, dim=-1).values
        last = torch.tensor([min(k, largest_k) - 1 for k in kept], device=logits.device)
        threshold = top.gather(1, last[:, None])
        everything = torch.tensor([k == num_tokens for k in kept], device=logits.device)
        logits = logits.masked_fill(logits < threshold.masked_fill(everything[:, None], -torch.inf), -torch.inf)
    if any(p.top_p < 1 for p in params):
        logits = _keep_top_p(logits, _column(completions, "top_p", logits))
    if any(p.min_p > 0 for p in params):
        threshold = logits.amax(dim=-1, keepdim=True) + _column(completions, "min_p", logits).log()
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


def _column(completions: Sequence[Completion], name: str, like: Tensor) -> Tensor:
    """A sampling parameter of each sequence as a column ``[S, 1]`` of a tensor's dtype and device.

    A positive value stays positive and finite there, however extreme.
    """
    limits = torch.finfo(like.dtype)
    column = torch.tensor([getattr(completion.params, name) for completion in completions], dtype=torch.float64)
    column = torch.where(column > 0, column.clamp(limits.tiny, limits.max), column)
    return column.to(device=like.device, dtype=like.dtype)[:, None]
