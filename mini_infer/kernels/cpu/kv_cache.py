"""The paged KV cache: its memory order, and writing to it.

Decode attention reads keys and values in opposite ways, so they lie in opposite orders. All in one block of one head:

    keys    [head_dim, block_size]: a query's feature times that feature of 16 tokens gives 16 scores at once
    values  [block_size, head_dim]: a token's weight times 16 of its features adds to 16 features of the result

A task is one token's key and value, which become codes of 8 bits on the way where the cache holds such. Bytes: each in
and out once; floor: bytes / memory bandwidth.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu.jit import (
    CACHE_ELEMENTS,
    ELEMENTS,
    FIRST,
    Kernel,
    kernel,
    load,
    nearest,
    pointer,
    register_fast,
    store,
    tasks,
)
from mini_infer.kernels.reference import kv_cache as reference
from mini_infer.kernels.registry import register


@register("allocate_kv_cache", backend="cpu", devices=["cpu"], priority=10)
def allocate_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    keys = torch.empty((num_blocks, num_kv_heads, head_dim, block_size), dtype=dtype, device=device)
    values = torch.empty((num_blocks, num_kv_heads, block_size, head_dim), dtype=dtype, device=device)
    return keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)


def has_fast_layout(key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether a cache lies in memory as `allocate_kv_cache` makes it."""
    return key_cache.permute(0, 2, 3, 1).is_contiguous() and value_cache.transpose(1, 2).is_contiguous()


@register_fast("write_kv", reference.write_kv)
def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> None:
    if key_cache.dtype not in CACHE_ELEMENTS:
        return reference.write_kv(key, value, key_cache, value_cache, slot_mapping, kv_scales)
    num_tokens, num_kv_heads, head_dim = key.shape
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    slots = slot_mapping.to(torch.int64).contiguous()
    _kernel(ELEMENTS[key.dtype], kv_scales is not None)(
        num_tokens,
        key.data_ptr(),
        value.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slots.data_ptr(),
        key_cache.shape[1],
        num_kv_heads,
        head_dim,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride(),
        *value_cache.stride(),
        0 if kv_scales is None else kv_scales.data_ptr(),
        work=4 * key.numel(),
    )


@functools.cache
def _kernel(element: type, quantize: bool) -> Kernel:
    cache_element = np.int8 if quantize else element

    @kernel
    def write_kv(args):
        slots, block_size = pointer(args[FIRST + 4], np.int64), args[FIRST + 5]
        num_kv_heads, head_dim = args[FIRST + 6], args[FIRST + 7]
        for token in tasks(args):
            slot = slots[token]
            if slot >= 0:
                for which in range(2):  # keys, then values
                    new, cache = pointer(args[FIRST + which], element), pointer(args[FIRST + 2 + which], cache_element)
                    scales = pointer(args[FIRST + 20], np.uint16)
                    token_stride, head_stride = args[FIRST + 8 + 2 * which], args[FIRST + 9 + 2 * which]
                    strides = FIRST + 12 + 4 * which
                    place = slot // block_size * args[strides] + slot % block_size * args[strides + 1]
                    for head in range(num_kv_heads):
                        at = token * token_stride + head * head_stride
                        to, feature_stride = place + head * args[strides + 2], args[strides + 3]
                        if quantize:
                            top, finite = np.float32(0), np.float32(0)
                            for i in range(head_dim):
                                number = load(new, at + i)
                                top = max(top, abs(number))
                                finite += number * np.float32(0)  # NaN if it is none, or an infinity
                            side = ((slot // block_size * num_kv_heads + head) * 2 + which) * block_size
                            side += slot % block_size
                            store(scales, side, top / np.float32(127) + finite)
                            scale = load(scales, side)
                            inverse = np.float32(1) / scale if scale > np.float32(1e-37) else np.float32(0)
                            for i in range(head_dim):
                                code = nearest(load(new, at + i) * inverse) if finite == np.float32(0) else 0
                                cache[to + i * feature_stride] = np.int8(code)
                        else:
                            for i in range(head_dim):
                                cache[to + i * feature_stride] = new[at + i]

    return write_kv
