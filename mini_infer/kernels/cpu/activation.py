"""SwiGLU's gate.

    y = silu(gate) * up        silu(z) = z / (1 + e^-z)

A task is one row. Bytes: gate and up in, y out; floor: bytes / memory bandwidth. e^z is computed by a polynomial so
that the loop is vectorised; the library's function would be called for one number at a time.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu.jit import (
    ELEMENTS,
    FIRST,
    Kernel,
    exp,
    kernel,
    load,
    pointer,
    register_fast,
    rounded,
    store,
    tasks,
)
from mini_infer.kernels.reference import activation as reference


@register_fast("silu_and_mul", reference.silu_and_mul)
def silu_and_mul(x: Tensor) -> Tensor:
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
    num_rows = y.numel() // width if width else 0
    _kernel(ELEMENTS[x.dtype])(num_rows, x.data_ptr(), y.data_ptr(), width, work=8 * y.numel())
    return y


@functools.cache
def _kernel(element: type) -> Kernel:
    @kernel
    def silu_and_mul(args):
        x, y, width = pointer(args[FIRST], element), pointer(args[FIRST + 1], element), args[FIRST + 2]
        for row in tasks(args):
            gate, up, out = 2 * row * width, (2 * row + 1) * width, row * width
            for i in range(width):
                z = load(x, gate + i)
                activated = rounded(x, z / (np.float32(1) + exp(-z)))
                store(y, out + i, activated * load(x, up + i))

    return silu_and_mul
