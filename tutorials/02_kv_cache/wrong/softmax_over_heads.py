HINT = {"en": "softmax runs over the keys", "zh": "沿着键"}

import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    key_cache[num_cached], value_cache[num_cached] = key, value
    keys, values = key_cache[: num_cached + 1], value_cache[: num_cached + 1]
    keys, values = (x.repeat_interleave(query.shape[0] // key.shape[0], dim=1) for x in (keys, values))
    scores = torch.einsum("hd,jhd->hj", query, keys) / key.shape[-1] ** 0.5
    return torch.einsum("hj,jhd->hd", scores.softmax(dim=0), values)
