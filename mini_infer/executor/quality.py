"""How far one model's predictions are from another's, token by token of a text: what quantisation costs.

At each place of the text both models give a distribution over the next token, p of the one that is compared with and q
of the other.

    KLD = Σ p(t) (ln p(t) − ln q(t))         0 where they agree; what a token costs in nats if q is taken for p
    perplexity = exp(mean of −ln q(t))       of the tokens t that the text has

Kullback and Leibler, On Information and Sufficiency, 1951, https://doi.org/10.1214/aoms/1177729694
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_infer.kernels import AttentionMetadata
from mini_infer.models import Batch, Decoder
from mini_infer.models.linear import Linear

BLOCK_SIZE = 16
ROWS_AT_ONCE = 64
"""Of logits, which are the largest thing there is here."""


@dataclass(frozen=True)
class Quality:
    """Means are over all tokens that are predicted; each error is that of the mean, one standard deviation.

    Attributes:
        num_tokens: how many that are.
        perplexity, perplexity_error: of the model.
        base_perplexity: of the model that it is compared with.
        mean_kld, mean_kld_error, kld_999, max_kld: in nats; ``kld_999`` is the 99.9th percentile.
        same_top: share of places where both have the same likeliest token.
        bytes_per_weight, base_bytes_per_weight: of all weights, with scales and whatever else they need.
    """

    num_tokens: int
    perplexity: float
    perplexity_error: float
    base_perplexity: float
    mean_kld: float
    mean_kld_error: float
    kld_999: float
    max_kld: float
    same_top: float
    bytes_per_weight: float
    base_bytes_per_weight: float


def compare(
    model: Decoder, base: Decoder, token_ids: Sequence[int], window: int, cache_dtype: torch.dtype | None = None
) -> Quality:
    """Compare two models on a text, in windows of so many tokens, of which each begins anew.

    Args:
        model: the one in question.
        base: the one that is right.
        token_ids: the text; both have to have the same vocabulary.
        window: tokens of a window, at least 2.
        cache_dtype: of the first one's keys and values; None is its own.
    """
    divergences: list[Tensor] = []
    surprises: list[Tensor] = []
    base_surprises: list[Tensor] = []
    same = 0
    with torch.inference_mode():
        for start in range(0, len(token_ids) - 1, window):
            tokens = torch.tensor(token_ids[start : start + window])
            nexts = tokens[1:].split(ROWS_AT_ONCE)
            predicted = _log_probabilities(model, tokens, cache_dtype or model.dtype)
            right = _log_probabilities(base, tokens, base.dtype)
            for ours, theirs, wanted in zip(predicted, right, nexts, strict=True):
                divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
                surprises.append(-ours.gather(-1, wanted[:, None]).squeeze(-1))
                base_surprises.append(-theirs.gather(-1, wanted[:, None]).squeeze(-1))
                same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    kld, surprise, base_surprise = (torch.cat(parts) for parts in (divergences, surprises, base_surprises))
    perplexity = math.exp(surprise.mean())
    return Quality(
        num_tokens=len(kld),
        perplexity=perplexity,
        perplexity_error=perplexity * _error(surprise),
        base_perplexity=math.exp(base_surprise.mean()),
        mean_kld=float(kld.mean()),
        mean_kld_error=_error(kld),
        kld_999=float(kld.quantile(0.999)),
        max_kld=float(kld.max()),
        same_top=same / len(kld),
        bytes_per_weight=stored_bytes(model) / model.num_parameters,
        base_bytes_per_weight=stored_bytes(base) / base.num_parameters,
    )


def stored_bytes(model: Decoder) -> int:
    """What a model's weights take as they are stored, before kernels rearrange them."""
    products = sum(module.bytes for module in model.modules() if isinstance(module, Linear))
    looked_up = 0 if model.embedding is None else model.embedding.bytes
    norms = sum(parameter.nbytes for name, parameter in model.named_parameters() if "norm" in name)
    return products + looked_up + norms


def _error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def _log_probabilities(model: Decoder, tokens: Tensor, cache_dtype: torch.dtype) -> Iterator[Tensor]:
    """Float64 rows ``[at most ROWS_AT_ONCE, vocab_size]``, one for each token but the last."""
    count, device = len(tokens), torch.device("cpu")
    blocks = -(-count // BLOCK_SIZE)
    cache = [
        model.kernels.allocate_kv_cache(blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, spec.dtype, device)
        for spec in model.config.cache_specs(cache_dtype)
    ]
    starts = torch.tensor([0, count], dtype=torch.int32)
    metadata = AttentionMetadata(
        slot_mapping=torch.arange(count),
        query_start_loc=starts,
        prefill_start_loc=starts,
        context_lens=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        num_decodes=0,
    )
    hidden = model(Batch(tokens, torch.arange(count), metadata), cache)[:-1]
    for rows in hidden.split(ROWS_AT_ONCE):
        logits = model.compute_logits(rows)
        assert logits is not None, "the whole model has them"
        yield logits.double().log_softmax(-1)
