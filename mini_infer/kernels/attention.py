"""A step's attention as one call: what it has to know of the step, and how it is composed of three operations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Which of a step's T tokens belong to which of its S sequences, where they are written and what they see.

    Sequences with exactly one new token that sees its whole context (decodes) may come first and be counted in
    `num_decodes`; the others, prompt chunks, follow.

    Attributes:
        slot_mapping: int64 `[T]`, where each token's key and value go: `block_id * block_size + offset`; -1 is nowhere.
        query_start_loc: int32 `[S + 1]`; sequence s owns tokens `query_start_loc[s]:query_start_loc[s + 1]`.
        prefill_start_loc: int32 `[S - num_decodes + 1]`, the same seen from the first prompt chunk:
            `query_start_loc[num_decodes:] - num_decodes`.
        context_lens: int32 `[S]`, tokens of each sequence in the cache once this step's are written.
        block_tables: int32 `[S, max_blocks]`, block ids; entries beyond a sequence's own blocks are arbitrary.
        num_decodes: how many leading sequences are decodes.
        span: what prompt chunks see, as in `paged_prefill_attention`; 1 is causal.
    """

    slot_mapping: Tensor
    query_start_loc: Tensor
    prefill_start_loc: Tensor
    context_lens: Tensor
    block_tables: Tensor
    num_decodes: int
    span: int = 1


PARTS = ("write_kv", "paged_attention", "paged_prefill_attention")
"""The operations that `attention` is composed of where no backend has it as a whole."""


def compose(
    write_kv: Callable[..., None],
    paged_attention: Callable[..., Tensor],
    paged_prefill_attention: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """`attention`, as an implementation, from implementations of its parts."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
        *kv_scales: Tensor,
    ) -> Tensor:
        write_kv(key, value, key_cache, value_cache, metadata.slot_mapping, *kv_scales)
        tables, lengths, n = metadata.block_tables, metadata.context_lens, metadata.num_decodes
        if n == len(tables):  # decodes alone, as most steps are: nothing is cut
            return paged_attention(query, key_cache, value_cache, tables, lengths, scale, sliding_window, *kv_scales)
        starts, span = metadata.prefill_start_loc, metadata.span
        if n == 0:
            return paged_prefill_attention(
                query, key_cache, value_cache, tables, lengths, starts, scale, sliding_window, span, *kv_scales
            )
        # A decode is one token, so the first n sequences are also the first n tokens.
        return torch.cat(
            (
                paged_attention(
                    query[:n], key_cache, value_cache, tables[:n], lengths[:n], scale, sliding_window, *kv_scales
                ),
                paged_prefill_attention(
                    query[n:],
                    key_cache,
                    value_cache,
                    tables[n:],
                    lengths[n:],
                    starts,
                    scale,
                    sliding_window,
                    span,
                    *kv_scales,
                ),
            )
        )

    return attention
