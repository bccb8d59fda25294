HINT = {"en": "divided by the square root", "zh": "除以 head_dim 的平方根"}

import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    key_cache[num_cached], value_cache[num_cached] = key, value
    keys, values = key_cache[: num_cached + 1], value_cache[: num_cached + 1]
    grouped = query.unflatten(0, (key.shape[0], -1))
    scores = torch.einsum("kgd,jkd->kgj", grouped, keys)
    return torch.einsum("kgj,jkd->kgd", scores.softmax(dim=-1), values).flatten(0, 1)
