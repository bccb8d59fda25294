HINT = {"en": "rows that were never written", "zh": "从未写过的行"}

import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    key_cache[num_cached], value_cache[num_cached] = key, value
    grouped = query.unflatten(0, (key.shape[0], -1))
    scores = torch.einsum("kgd,jkd->kgj", grouped, key_cache) / key.shape[-1] ** 0.5
    return torch.einsum("kgj,jkd->kgd", scores.softmax(dim=-1), value_cache).flatten(0, 1)
