"""Chapter 2: attention of one new token, with a KV cache."""

import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    """Attend to everything so far, the new token included.

    The first `num_cached` rows of the caches hold the keys and values of the tokens before this one.

    1. Put the new token's key and value into the caches, in place, in the row behind those.
    2. For each query head h, score every key that is there now: scale * query[h] · key_cache[j, kv], where scale is
       1 / sqrt(head_dim). Query heads share KV heads in groups of neighbours: with 8 query heads and 4 KV heads, query
       heads 0 and 1 use KV head 0, heads 2 and 3 use KV head 1, and so on.
    3. Softmax over the keys gives weights; the result is the sum of the values with these weights.

    Rows of the caches further on hold anything, even NaN; do not let them matter.

    Args:
        query: `[num_heads, head_dim]`, of the new token.
        key: `[num_kv_heads, head_dim]`, of the new token; num_kv_heads divides num_heads.
        value: of key's shape.
        key_cache: `[capacity, num_kv_heads, head_dim]`, written in place.
        value_cache: of key_cache's shape, written in place.
        num_cached: tokens in the caches before this one, less than capacity.

    Returns:
        `[num_heads, head_dim]`.
    """
    ...
