"""Memory for large tensors on a CPU, outside the heap; and how to tell that there is none left."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

_LARGE, _PAGE = 1 << 20, 2 << 20  # bytes; of a large page where there are any, as a rule


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor with arbitrary contents; a large one has memory of its own.

    Weights come and go while a model loads, and in the heap they would leave holes as large as the model. Large pages
    are asked for where the system has them: setting up small ones takes longer than filling them, and at the end of
    each the processor stops reading ahead. The memory begins and ends with such pages, since any other part would have
    small ones.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype)
    try:
        whole_pages = -(-num_bytes // _PAGE) * _PAGE
        memory = mmap.mmap(-1, whole_pages + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.empty(shape, dtype=dtype)  # whose error is the one that callers know
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    numbers = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -numbers.data_ptr() % _PAGE
    return numbers[begin : begin + num_bytes].view(dtype).view(shape)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed. On a CPU PyTorch has no class for this, only the allocator's words, and others for
    more bytes than an integer can count."""
    words = ("allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(some in str(error) for some in words)
