"""The likeliest token and its log probability.

    i = argmax_j z_j        logprob = z_i - log Σ_j exp(z_j)

A task is one row, a few hundred kilobytes that stay in the core's cache: once for the largest, once for its place, once
for the sum. Bytes: the logits once, in their own dtype; PyTorch's composition writes them out as float32 first, and
goes to memory for each of its steps. Floor: bytes / memory bandwidth.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu.jit import ELEMENTS, FIRST, Kernel, exp, kernel, load, pointer, register_fast, tasks
from mini_infer.kernels.cpu.softmax import largest_score
from mini_infer.kernels.reference import sampling as reference


@register_fast("argmax_logprob", reference.argmax_logprob)
def argmax_logprob(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    logprobs = torch.empty(num_rows, dtype=torch.float32)
    _kernel(ELEMENTS[logits.dtype])(
        num_rows, logits.data_ptr(), token_ids.data_ptr(), logprobs.data_ptr(), vocab_size, work=logits.numel()
    )
    return token_ids, logprobs


@functools.cache
def _kernel(element: type) -> Kernel:
    @kernel
    def argmax_logprob(args):
        logits, vocab_size = pointer(args[FIRST], element), args[FIRST + 3]
        token_ids, logprobs = pointer(args[FIRST + 1], np.int64), pointer(args[FIRST + 2], np.float32)
        for row in tasks(args):
            begin, end = row * vocab_size, (row + 1) * vocab_size
            largest = largest_score(logits, begin, end, np.float32(1))
            place = begin
            while place < end - 1 and load(logits, place) != largest:
                place += 1
            total = np.float32(0)
            for i in range(begin, end):
                total += exp(load(logits, i) - largest)
            token_ids[row] = place - begin
            logprobs[row] = -np.log(total)

    return argmax_logprob
