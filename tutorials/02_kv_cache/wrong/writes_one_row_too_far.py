HINT = {"en": "one row too far", "zh": "后一行"}

import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    key_cache[num_cached + 1 :][:1], value_cache[num_cached + 1 :][:1] = key, value
    keys = torch.cat((key_cache[:num_cached], key[None]))
    values = torch.cat((value_cache[:num_cached], value[None]))
    grouped = query.unflatten(0, (key.shape[0], -1))
    scores = torch.einsum("kgd,jkd->kgj", grouped, keys) / key.shape[-1] ** 0.5
    return torch.einsum("kgj,jkd->kgd", scores.softmax(dim=-1), values).flatten(0, 1)
