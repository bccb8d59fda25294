"""RMSNorm, alone and fused with the residual addition before it.

    y = weight * x / sqrt(mean(x²) + eps)        total = x + residual, then y of total

A task is one row. Its numbers are read twice, the second time from the core's cache: once for the sum of squares, once
to be scaled. PyTorch's composition of the same formula goes to memory for each of its seven steps.

Bytes: x in, y out (fused: x and residual in, y and total out). Floor: bytes / memory bandwidth; but one row of a decode
step is only a few kilobytes, so there what counts is to be one call instead of seven.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu.jit import (
    ELEMENTS,
    FIRST,
    Kernel,
    as_float,
    float_bits,
    kernel,
    load,
    pointer,
    register_fast,
    rounded,
    store,
    tasks,
)
from mini_infer.kernels.reference import norm as reference


@register_fast("rmsnorm", reference.rmsnorm)
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _run(x, None, weight, y, None, eps)
    return y


@register_fast("add_rmsnorm", reference.add_rmsnorm)
def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    _run(x, residual, weight, y, total, eps)
    return y, total


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor | None, eps: float) -> None:
    width = x.shape[-1]
    weight = weight.contiguous()
    _kernel(ELEMENTS[x.dtype], residual is not None)(
        x.numel() // width if width else 0,
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        0 if total is None else total.data_ptr(),
        width,
        float_bits(eps),
        work=x.numel(),
    )


@functools.cache
def _kernel(element: type, adds: bool) -> Kernel:
    @kernel
    def rmsnorm(args):
        x, residual = pointer(args[FIRST], element), pointer(args[FIRST + 1], element)
        weight = pointer(args[FIRST + 2], element)
        y, total = pointer(args[FIRST + 3], element), pointer(args[FIRST + 4], element)
        width, eps = args[FIRST + 5], as_float(args[FIRST + 6])
        for row in tasks(args):
            begin = row * width
            normed = total if adds else x
            squares = np.float32(0)
            for i in range(width):
                value = load(x, begin + i)
                if adds:
                    # The norm sees the sum as the next layer will: already rounded.
                    value = rounded(x, value + load(residual, begin + i))
                    store(total, begin + i, value)
                squares += value * value
            scale = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
            for i in range(width):
                store(y, begin + i, rounded(x, load(normed, begin + i) * scale) * load(weight, i))

    return rmsnorm
