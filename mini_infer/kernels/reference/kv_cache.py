"""The paged KV cache: making it and writing to it."""

import torch
from torch import Tensor

from mini_infer.kernels.registry import REFERENCE, register


@register("allocate_kv_cache", backend=REFERENCE)
def allocate_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


@register("write_kv", backend=REFERENCE)
def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    # Indexed as (block, offset) because a cache that a backend allocated need not be contiguous.
    block_size = key_cache.shape[1]
    blocks, offsets = slots // block_size, slots % block_size
    key_cache[blocks, offsets] = key[written]
    value_cache[blocks, offsets] = value[written]
