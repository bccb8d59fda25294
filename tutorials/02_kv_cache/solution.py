import torch
from torch import Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, num_cached: int
) -> Tensor:
    key_cache[num_cached], value_cache[num_cached] = key, value
    keys, values = key_cache[: num_cached + 1], value_cache[: num_cached + 1]
    num_kv_heads, head_dim = key.shape
    grouped = query.unflatten(0, (num_kv_heads, -1))
    scores = torch.einsum("kgd,jkd->kgj", grouped, keys) / head_dim**0.5
    return torch.einsum("kgj,jkd->kgd", scores.softmax(dim=-1), values).flatten(0, 1)
