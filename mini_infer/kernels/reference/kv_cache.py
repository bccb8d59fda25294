"""The paged KV cache: making it and writing to it."""

import torch
from torch import Tensor

from mini_infer.kernels.registry import REFERENCE, register

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number that a code of 8 bits stands for."""


@register("allocate_kv_cache", backend=REFERENCE)
def allocate_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


@register("write_kv", backend=REFERENCE)
def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> None:
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    # Indexed as (block, offset) because a cache that a backend allocated need not be contiguous.
    block_size = key_cache.shape[1]
    blocks, offsets = slots // block_size, slots % block_size
    for which, (new, cache) in enumerate(((key, key_cache), (value, value_cache))):
        numbers = new[written]
        if kv_scales is not None:
            numbers, scales = quantize(numbers, cache.dtype)
            kv_scales[blocks, :, which, offsets] = scales.to(kv_scales.dtype)
        cache[blocks, offsets] = numbers


def quantize(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits, and the scale of each row: bfloat16, of numbers' shape without its last dimension.

    A row that holds NaN or an infinity gets such a scale and codes of 0, so that whatever is made of it is NaN.
    """
    numbers = numbers.float()
    scales = (numbers.abs().amax(-1) / LIMITS[dtype]).to(torch.bfloat16)
    inverse = torch.where(scales > 1e-37, 1 / scales.float(), 0)
    codes = (numbers * inverse[..., None]).nan_to_num(0)
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scales
