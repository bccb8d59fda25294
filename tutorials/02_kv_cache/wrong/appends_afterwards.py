HINT = {"en": "sees itself", "zh": "看得见自己"}

import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    keys, values = key_cache[:num_cached], value_cache[:num_cached]
    grouped = query.unflatten(0, (key.shape[0], -1))
    scores = torch.einsum("kgd,jkd->kgj", grouped, keys) / key.shape[-1] ** 0.5
    output = torch.einsum("kgj,jkd->kgd", scores.softmax(dim=-1), values).flatten(0, 1)
    key_cache[num_cached], value_cache[num_cached] = key, value
    return output
