"""Logits to tokens, for the whole batch at once."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mini_infer.executor.device import send
from mini_infer.kernels import Kernels
from mini_infer.random import uniforms
from mini_infer.step import Draws, LogitEdits

_GROUP = 64
"""Neighbours in the vocabulary that are looked at together for the largest logits."""

_SHARE = 2
"""That pays where the tokens looked at are at most the vocabulary divided by this."""

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers as wide as each kind of logits."""

_SORTED = 512
"""Tokens that are sorted for ``top_p`` before all are, where ``top_k`` does not leave fewer."""


def sample(logits: Tensor, draws: Draws, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """The token of each draw. On a GPU the host waits for nothing here.

    Args:
        logits: ``[D, vocab]``, any float dtype; computed on in float32 or wider.
        draws: what is to be drawn from each row.
        kernels: finds the likeliest tokens.

    Returns:
        Token ids int64 ``[D]``, and their log probabilities under the model itself (before edits, temperature and
        filters) ``[D]``.
    """
    raw_ids, raw_logprobs = kernels.argmax_logprob(logits)
    edits = draws.edits if logits.is_cuda else _without_idle_masks(draws, raw_ids)
    adjusted = _mask(_edit(logits, edits), edits)
    is_drawn = draws.temperature > 0
    is_drawn[edits.forced_draws] = False
    drawing = np.flatnonzero(is_drawn)
    if adjusted is logits and not len(drawing) and not len(edits.forced_draws):
        return raw_ids, raw_logprobs
    token_ids = raw_ids
    if len(edits.scaled_draws) or len(edits.added_draws):
        token_ids = adjusted.argmax(dim=-1)
    elif adjusted is not logits:
        rows = _sent(edits.masked_draws, logits)
        token_ids = raw_ids.index_copy(0, rows, _wide(adjusted[rows]).argmax(dim=-1))
    if len(drawing) == len(draws):  # then no row needs to be copied
        token_ids = _draw(adjusted, _Filters.of(draws, drawing), kernels)
    elif len(drawing):
        rows = send(torch.from_numpy(drawing), logits.device)
        token_ids = token_ids.index_copy(0, rows, _draw(adjusted[rows], _Filters.of(draws, drawing), kernels))
    if len(edits.forced_draws):
        forced = (_sent(edits.forced_draws, logits), _sent(edits.forced_ids, logits))
        token_ids = token_ids.index_copy(0, *forced)
    # logprob(a) - logprob(b) = logit(a) - logit(b): the sum over the vocabulary is made once.
    chosen_logits, largest = (_wide(logits.gather(1, ids[:, None])[:, 0]) for ids in (token_ids, raw_ids))
    behind = torch.where(token_ids == raw_ids, 0, chosen_logits - largest)  # 0 for inf - inf, too
    return token_ids, raw_logprobs + behind


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _edit(logits: Tensor, edits: LogitEdits) -> Tensor:
    """The logits with all edits; the very same tensor if there are none."""
    if not len(edits.scaled_draws) and not len(edits.added_draws):
        return logits
    logits = logits.clone() if logits.dtype is torch.float64 else logits.to(torch.float32, copy=True)
    if len(edits.scaled_draws):
        place = (_sent(edits.scaled_draws, logits), _sent(edits.scaled_ids, logits))
        factors = _sent(edits.factors, logits).to(logits.dtype)
        before = logits[place]
        logits[place] = torch.where(before > 0, before / factors, before * factors)
    if len(edits.added_draws):
        place = (_sent(edits.added_draws, logits), _sent(edits.added_ids, logits))
        logits.index_put_(place, _sent(edits.terms, logits).to(logits.dtype), accumulate=True)
    return logits


def _without_idle_masks(draws: Draws, raw_ids: Tensor) -> LogitEdits:
    """The edits without the masks of greedy draws whose likeliest token they allow: it stays the likeliest."""
    edits = draws.edits
    if not len(edits.masked_draws) or len(edits.scaled_draws) or len(edits.added_draws):
        return edits
    likeliest = raw_ids.numpy()[edits.masked_draws]
    is_allowed = edits.masks[np.arange(len(likeliest)), likeliest // 8] >> (likeliest % 8) & 1
    kept = np.flatnonzero((is_allowed == 0) | (draws.temperature[edits.masked_draws] > 0))
    return replace(edits, masked_draws=edits.masked_draws[kept], masks=edits.masks[kept])


def _mask(logits: Tensor, edits: LogitEdits) -> Tensor:
    """The logits with -inf wherever a draw has a mask and the mask no bit; the very same tensor if there are none."""
    if not len(edits.masked_draws):
        return logits
    banned = np.unpackbits(~edits.masks, axis=-1, count=logits.shape[-1], bitorder="little").view(np.bool_)
    masked = logits.clone()
    if logits.is_cuda:
        rows = _sent(edits.masked_draws, logits)
        masked[rows] = masked[rows].masked_fill_(_sent(banned, logits), -torch.inf)
        return masked
    # NumPy has no bfloat16, but only bits are copied here; it takes a tenth of the time that torch does.
    bits = masked.view(_BITS[logits.dtype]).numpy()
    minus_infinity = torch.tensor(-torch.inf, dtype=logits.dtype).view(_BITS[logits.dtype]).numpy()
    for row, draw in enumerate(edits.masked_draws.tolist()):
        np.putmask(bits[draw], banned[row], minus_infinity)
    return masked


class _Filters:
    """What decides draws that are not greedy, for some rows."""

    def __init__(self, uniform: npt.NDArray[np.float64], columns: "dict[str, npt.NDArray[np.float64]]") -> None:
        self.uniform = uniform
        self.columns = columns

    @classmethod
    def of(cls, draws: Draws, rows: npt.NDArray[np.int64]) -> "_Filters":
        uniform = uniforms(draws.seeds[rows], draws.indices[rows], draws.positions[rows])
        names = ("temperature", "top_k", "top_p", "min_p")
        return cls(uniform, {name: getattr(draws, name)[rows] for name in names})

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> "_Filters":
        return _Filters(self.uniform[rows], {name: column[rows] for name, column in self.columns.items()})

    def column(self, name: str, like: Tensor) -> Tensor:
        """A parameter as a column ``[R, 1]`` of a tensor's dtype and device.

        A positive value stays positive and finite there, however extreme.
        """
        limits = torch.finfo(like.dtype)
        column = torch.from_numpy(self.columns[name])
        column = torch.where(column > 0, column.clamp(limits.tiny, limits.max), column)
        return send(column.to(like.dtype), like.device)[:, None]


def _draw(logits: Tensor, filters: _Filters, kernels: Kernels) -> Tensor:
    """One token per row, drawn from the filtered distribution by inverting its cumulative sum."""
    # How many are left in `_likeliest` the host must ask for, which on a GPU costs more than it saves.
    most = 0 if logits.is_cuda else logits.shape[-1] // _SHARE
    top_k = filters.columns["top_k"]
    has_few = (top_k > 0) & (top_k * _GROUP <= most)
    if not has_few.any():
        return _one_each(logits, filters, kernels)
    token_ids = torch.empty(len(top_k), dtype=torch.int64)
    for reduced in (True, False):
        rows = np.flatnonzero(has_few == reduced)
        if not len(rows):
            continue
        some = logits if len(rows) == len(top_k) else logits[torch.from_numpy(rows)]
        if reduced:
            some, ids = _likeliest(some, int(top_k[rows].max()))
            chosen = ids.gather(1, _one_each(some, filters[rows], kernels)[:, None])[:, 0]
        else:
            chosen = _one_each(some, filters[rows], kernels)
        token_ids[torch.from_numpy(rows)] = chosen
    return token_ids


def _one_each(logits: Tensor, filters: _Filters, kernels: Kernels) -> Tensor:
    """Where in each row the draw's own random number falls; ``[R]``. On a CPU in one kernel."""
    if kernels.backend_of("argmax_logprob") == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
        from mini_infer.kernels.cpu.sampling import draw_tokens

        of = filters.columns
        return draw_tokens(logits, of["temperature"], of["top_k"], of["top_p"], of["min_p"], filters.uniform)
    return _invert(_wide(logits), filters)


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


def _invert(logits: Tensor, filters: _Filters) -> Tensor:
    """Where in each row the draw's own random number falls; ``[R]``."""
    # The largest logit, made finite, is moved to 0 first, so that no temperature makes inf - inf of it.
    logits = logits.clamp(max=torch.finfo(logits.dtype).max)
    logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(filters.column("temperature", logits))
    cumulative = _weights(logits, filters).to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = _sent(filters.uniform, logits)[:, None]
    # Below the total even after rounding, so that the token found always has a positive probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # A row that is not a distribution (its logits are NaN) yields some token; its log probability tells.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _weights(logits: Tensor, filters: _Filters) -> Tensor:
    """e^logits, and 0 where ``top_k``, ``top_p`` or ``min_p`` drop a token. Tokens as likely as the k-th all stay.

    Args:
        logits: divided by the temperature; the largest of each row is 0.
        filters: of these rows.
    """
    num_tokens = logits.shape[-1]
    top_k, columns = filters.columns["top_k"], filters.columns
    top_k = np.where((top_k > 0) & (top_k < num_tokens), top_k, num_tokens)
    has_top_k, has_top_p = bool((top_k < num_tokens).any()), bool((columns["top_p"] < 1).any())
    weights = logits.exp()
    if has_top_k or (has_top_p and not logits.is_cuda):
        # One more than top_k leaves, which shows that these are all.
        ranked = _ranked(logits, int(np.where(top_k < num_tokens, top_k + 1, _SORTED).max()))
    if has_top_k:
        last = _sent(np.where(top_k < num_tokens, top_k - 1, 0), logits)
        everything = _sent(top_k == num_tokens, logits)
        threshold = ranked.gather(1, last[:, None]).masked_fill(everything[:, None], -torch.inf)
        weights.masked_fill_(logits < threshold, 0)
        ranked = ranked.masked_fill(ranked < threshold, -torch.inf)
    if has_top_p:
        top_p = filters.column("top_p", logits).clamp(min=torch.finfo(logits.dtype).tiny)  # 0: the likeliest token
        weights = _keep_top_p_unasked(weights, top_p) if logits.is_cuda else _keep_top_p(weights, top_p, ranked.exp())
    if (columns["min_p"] > 0).any():
        threshold = weights.amax(dim=-1, keepdim=True) * filters.column("min_p", logits)
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


def _sent(array: "npt.NDArray[np.generic]", like: Tensor) -> Tensor:
    """An array as a tensor on another tensor's device."""
    return send(torch.from_numpy(array), like.device)
