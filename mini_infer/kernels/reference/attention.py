"""Attention whose keys and values lie in the blocks of a paged cache."""

import torch
from torch import Tensor

from mini_infer.kernels.attention import compose
from mini_infer.kernels.reference.kv_cache import write_kv
from mini_infer.kernels.registry import REFERENCE, register


@register("paged_attention", backend=REFERENCE)
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    # All sequences at once, padded to the longest: a loop would cost a dozen PyTorch calls per sequence and layer.
    longest = max(context_lens.tolist(), default=0)
    positions = torch.arange(longest, device=query.device)
    ends = context_lens[:, None]
    visible = positions < ends
    if sliding_window is not None:
        visible &= positions >= ends - sliding_window

    block_size = key_cache.shape[1]
    block_ids = block_tables[:, positions // block_size]
    block_ids = torch.where(visible, block_ids, 0)  # beyond a sequence's own blocks the table holds anything
    keys, values = _gather(key_cache, value_cache, kv_scales, block_ids, positions % block_size, query.dtype)
    values.masked_fill_(~visible[..., None], 0)  # a weight of 0 does not silence NaN: 0 * NaN is NaN
    return _attend(query[:, None], keys, values, visible[:, None], scale)[:, 0]


@register("paged_prefill_attention", backend=REFERENCE)
def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
    sliding_window: int | None,
    span: int,
    kv_scales: Tensor | None = None,
) -> Tensor:
    block_size = key_cache.shape[1]
    output = torch.zeros_like(query)
    starts = query_start.tolist()
    # Sequence by sequence: chunks differ in both lengths, so padding would cost the product of the two longest; and
    # each holds enough work to hide the cost of a loop.
    for block_table, length, start, end in zip(block_tables, context_lens.tolist(), starts, starts[1:], strict=False):
        keys_at = torch.arange(length, device=query.device)
        queries_at = keys_at[length - (end - start) :, None]  # the queries are the last tokens of the context
        visible = keys_at < (queries_at // span + 1) * span
        if sliding_window is not None:
            visible &= keys_at > queries_at - sliding_window
        block_ids = block_table[keys_at // block_size]
        keys, values = _gather(key_cache, value_cache, kv_scales, block_ids, keys_at % block_size, query.dtype)
        output[start:end] = _attend(query[start:end], keys, values, visible, scale)
    return output


def _gather(
    key_cache: Tensor,
    value_cache: Tensor,
    kv_scales: Tensor | None,
    block_ids: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Copies of the given slots, `[num_kv_heads, ..., head_dim]`: heads first, as the matrix products want them.

    They are as wide as the products with queries of `dtype` are.
    """
    wide = torch.promote_types(dtype, torch.float32)
    keys, values = (cache.permute(2, 0, 1, 3)[:, block_ids, offsets].to(wide) for cache in (key_cache, value_cache))
    if kv_scales is None:
        return keys, values
    scales = kv_scales.permute(2, 1, 0, 3)[:, :, block_ids, offsets, None].to(wide)
    return keys * scales[0], values * scales[1]


def _attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(scale * query · keys) · values over the visible keys.

    query `[..., Q, num_heads, head_dim]`, keys and values `[num_kv_heads, ..., K, head_dim]`, visible `[..., Q, K]`.
    """
    num_kv_heads, head_dim, wide = keys.shape[0], keys.shape[-1], keys.dtype
    # h is the KV head and g the query heads that share it, so that keys and values are never repeated.
    group = query.shape[-2] // num_kv_heads
    grouped = query.reshape(*query.shape[:-2], num_kv_heads, group, head_dim).to(wide)
    scores = scale * torch.einsum("...qhgd,h...kd->h...gqk", grouped, keys)
    # The lowest finite number instead of -inf: a row that sees nothing gets equal weights on zeroed values, not NaN.
    scores = scores.masked_fill(~visible.unsqueeze(-3), torch.finfo(wide).min)
    attended = torch.einsum("h...gqk,h...kd->...qhgd", scores.softmax(-1), values)
    return attended.reshape(query.shape).to(query.dtype)


register("attention", backend=REFERENCE)(compose(write_kv, paged_attention, paged_prefill_attention))
