HINT = {"en": "Neighbours share", "zh": "相邻的查询头"}

import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    key_cache[num_cached], value_cache[num_cached] = key, value
    keys, values = key_cache[: num_cached + 1], value_cache[: num_cached + 1]
    copies = query.shape[0] // key.shape[0]
    keys, values = keys.repeat(1, copies, 1), values.repeat(1, copies, 1)
    scores = torch.einsum("hd,jhd->hj", query, keys) / key.shape[-1] ** 0.5
    return torch.einsum("hj,jhd->hd", scores.softmax(dim=-1), values)
