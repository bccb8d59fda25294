"""Memory for large tensors on a CPU, outside the heap; and how to tell that there is none left."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor with arbitrary contents; a large one has memory of its own.

    Weights come and go while a model loads, and in the heap they would leave holes as large as the model. Large pages
    are asked for where the system has them: setting up small ones takes longer than filling them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.empty(shape, dtype=dtype)  # whose error is the one that callers know
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed. On a CPU PyTorch has no class for this, only the allocator's words, and others for
    more bytes than an integer can count."""
    words = ("allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(some in str(error) for some in words)
