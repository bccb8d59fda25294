"""Numbers in 8 bits: what a code stands for, and which code stands nearest to a number.

Only the newest GPUs convert float8_e4m3fn themselves. But shifted to where a float32 has its exponent and fraction, its
bits say a number that is 2^120 times too small, also where the exponent is 0: one multiplication is the conversion, and
the other way round the float32's lower 20 bits are rounded off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def bits(cache: Tensor) -> Tensor:
    """A cache as kernels read it: float8 as its bits."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


@triton.jit
def decoded(code, KIND: tl.constexpr):
    """Float32 of codes, int8 or the bits of float8_e4m3fn in uint8, of which the one that is NaN comes out as 480."""
    if KIND == "fp8":
        bits = code.to(tl.int32)
        return ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        return code.to(tl.float32)


@triton.jit
def encoded(number, KIND: tl.constexpr):
    """The nearest code of a float32 within the codes' range; of two equally near ones the even one."""
    if KIND == "fp8":
        bits = (number * 7.52316384526264e-37).to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        code = (size + 0x7FFFF + ((size >> 20) & 1)) >> 20
        return tl.where(bits < 0, code | 0x80, code).to(tl.uint8)
    else:
        return ((number + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23 leaves no room for a fraction
