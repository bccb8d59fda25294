"""Chapter 2: attention of one new token, with a KV cache. · 第 2 章：借助 KV 缓存，为一个新词元计算注意力。"""

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
    ---
    新词元对目前为止的全部词元（包括它自己）做注意力。

    两个缓存的前 `num_cached` 行，是它之前各词元的键和值。

    1. 把新词元的键和值就地写进缓存，放在紧接着的那一行。
    2. 对每个查询头 h，给此刻缓存里的每个键打分：scale * query[h] · key_cache[j, kv]，其中 scale 是
       1 / sqrt(head_dim)。相邻的几个查询头共用一个 KV 头：若有 8 个查询头、4 个 KV 头，则查询头 0、1 用 KV 头 0，
       查询头 2、3 用 KV 头 1，依此类推。
    3. 对各个键的分数做 softmax 得到权重，按权重把值相加，就是结果。

    缓存里更靠后的行可能是任何内容，甚至是 NaN，不能让它们影响结果。

    参数：
        query: `[num_heads, head_dim]`，新词元的查询。
        key: `[num_kv_heads, head_dim]`，新词元的键；num_heads 是 num_kv_heads 的整数倍。
        value: 形状同 key。
        key_cache: `[capacity, num_kv_heads, head_dim]`，就地写入。
        value_cache: 形状同 key_cache，就地写入。
        num_cached: 在它之前缓存里已有的词元数，小于 capacity。

    返回：
        `[num_heads, head_dim]`。
    """
    # hole
    key_cache[num_cached], value_cache[num_cached] = key, value
    keys, values = key_cache[: num_cached + 1], value_cache[: num_cached + 1]
    num_kv_heads, head_dim = key.shape
    grouped = query.unflatten(0, (num_kv_heads, -1))
    scores = torch.einsum("kgd,jkd->kgj", grouped, keys) / head_dim**0.5
    return torch.einsum("kgj,jkd->kgd", scores.softmax(dim=-1), values).flatten(0, 1)
    # end
