"""Logits to tokens, for the whole batch at once."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mini_infer.kernels import Kernels
from mini_infer.kernels.host import send
from mini_infer.random import uniforms
from mini_infer.step import Draws, LogitEdits

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers as wide as each kind of logits."""


def sample(logits: Tensor, draws: Draws, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """The token of each draw. On a GPU the host waits for nothing here.

    Args:
        logits: ``[D, vocab]``, any float dtype; computed on in float32 or wider.
        draws: what is to be drawn from each row.
        kernels: finds the likeliest tokens, and draws.

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
    elif len(greedy := edits.masked_draws[~is_drawn[edits.masked_draws]]):
        rows = send(greedy, logits.device)
        token_ids = raw_ids.index_copy(0, rows, kernels.argmax_logprob(adjusted[rows])[0])
    if len(drawing) == len(draws):  # then no row needs to be copied
        token_ids = _draw(adjusted, draws, drawing, kernels)
    elif len(drawing):
        rows = send(drawing, logits.device)
        token_ids = token_ids.index_copy(0, rows, _draw(adjusted[rows], draws, drawing, kernels))
    if len(edits.forced_draws):
        forced = (send(edits.forced_draws, logits.device), send(edits.forced_ids, logits.device))
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
        place = (send(edits.scaled_draws, logits.device), send(edits.scaled_ids, logits.device))
        factors = send(edits.factors, logits.device).to(logits.dtype)
        before = logits[place]
        logits[place] = torch.where(before > 0, before / factors, before * factors)
    if len(edits.added_draws):
        place = (send(edits.added_draws, logits.device), send(edits.added_ids, logits.device))
        logits.index_put_(place, send(edits.terms, logits.device).to(logits.dtype), accumulate=True)
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
        rows = send(edits.masked_draws, logits.device)
        masked[rows] = masked[rows].masked_fill_(send(banned, logits.device), -torch.inf)
        return masked
    # NumPy has no bfloat16, but only bits are copied here; it takes a tenth of the time that torch does.
    bits = masked.view(_BITS[logits.dtype]).numpy()
    minus_infinity = torch.tensor(-torch.inf, dtype=logits.dtype).view(_BITS[logits.dtype]).numpy()
    for row, draw in enumerate(edits.masked_draws.tolist()):
        np.putmask(bits[draw], banned[row], minus_infinity)
    return masked


def _draw(logits: Tensor, draws: Draws, drawing: npt.NDArray[np.int64], kernels: Kernels) -> Tensor:
    """The tokens of some of the draws, at random; ``logits`` are theirs."""
    uniform = uniforms(draws.seeds[drawing], draws.indices[drawing], draws.positions[drawing])
    temperature, top_k = draws.temperature[drawing], draws.top_k[drawing]
    return kernels.draw_tokens(logits, temperature, top_k, draws.top_p[drawing], draws.min_p[drawing], uniform)
