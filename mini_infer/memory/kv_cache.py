"""The KV cache's tensors, and copies of whole blocks within it and between the GPU's and the CPU's pool.

Whatever layout a backend gives a cache, its first dimension counts blocks; that is all this module knows of it.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Copies: TypeAlias = npt.NDArray[np.int64]
"""``[N, 2]``, (source, target) blocks."""


class KVCache:
    """Keys and values of every layer, with room for swapped blocks in CPU memory.

    Args:
        layers: the tensors of each layer's cache, ``[num_blocks, ...]``, on the model's device.
        num_cpu_blocks: blocks in CPU memory. For a GPU's cache that memory is pinned, and copies to it run on a
            stream of their own, beside the computation.
    """

    def __init__(self, layers: list[tuple[Tensor, ...]], num_cpu_blocks: int) -> None:
        self.layers = layers
        self._caches = [cache for layer in layers for cache in layer]
        on_gpu = self._caches[0].is_cuda
        self._cpu_caches = [
            torch.empty((num_cpu_blocks, *cache.shape[1:]), dtype=cache.dtype, pin_memory=on_gpu and num_cpu_blocks > 0)
            for cache in self._caches
        ]
        self._stream = torch.cuda.Stream(self._caches[0].device) if on_gpu and num_cpu_blocks else None

    def copy_blocks(self, copies: Copies) -> None:
        """Copy blocks within the cache. All sources are read before a target is written."""
        sources, targets = self._ids(copies)
        for cache in self._caches:
            cache[targets] = cache[sources]

    def swap_out(self, copies: Copies) -> None:
        """Copy blocks to CPU memory. The sources may be overwritten right after."""
        sources, targets = self._ids(copies)
        for cache, cpu_cache in zip(self._caches, self._cpu_caches, strict=True):
            moving = cache[sources]  # gathered before the step computes, so that it may reuse the blocks
            if self._stream is None:
                cpu_cache[targets] = moving
                continue
            self._stream.wait_stream(torch.cuda.current_stream(cache.device))
            with torch.cuda.stream(self._stream):
                for row, target in enumerate(copies[:, 1].tolist()):
                    cpu_cache[target].copy_(moving[row], non_blocking=True)
                moving.record_stream(self._stream)

    def swap_in(self, copies: Copies) -> None:
        """Copy blocks back from CPU memory, before anything that comes after on the model's device."""
        sources, targets = self._ids(copies)
        for cache, cpu_cache in zip(self._caches, self._cpu_caches, strict=True):
            if self._stream is None:
                cache[targets] = cpu_cache[sources]
                continue
            with torch.cuda.stream(self._stream):  # after every copy to the CPU that came before
                arriving = torch.empty((len(copies), *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
                for row, source in enumerate(copies[:, 0].tolist()):
                    arriving[row].copy_(cpu_cache[source], non_blocking=True)
            torch.cuda.current_stream(cache.device).wait_stream(self._stream)
            arriving.record_stream(torch.cuda.current_stream(cache.device))
            cache[targets] = arriving

    def _ids(self, copies: Copies) -> tuple[Tensor, Tensor]:
        pairs = torch.from_numpy(copies)
        if self._caches[0].is_cuda:
            pairs = pairs.pin_memory().to(self._caches[0].device, non_blocking=True)  # nobody waits for the device
        return pairs[:, 0], pairs[:, 1]
