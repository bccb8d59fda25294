"""A product of two sides in 8 bits: y = x Wᵀ + b for many tokens, where arithmetic and not memory is the limit.

The idea. Tensor cores multiply 8-bit numbers at twice the rate of 16-bit ones, if both sides have 8 bits. The weight
has; x is rounded when it arrives, with a scale of its own for each token and 128 neighbouring inputs, so that one
outlier spoils 127 numbers and not a whole row. First kernel: round x. Second: multiply, 128 inputs at a time.

    x [M, K]   │ 128 │ 128 │ ...      each block: scale = largest / limit, codes = round(x / scale)

    sums[m, n] += x_scale[m, block] * w_scale[n, block] * Σ_{k in block} x_code[m, k] * w_code[n, k]

The inner sum is one call of the tensor cores: exact in int32 for int8; for float8 in their own accumulator, which on
Hopper keeps about 14 bits. Taking it out every 128 inputs and adding in float32 is what keeps long sums accurate.

Grid. Rounding: one program per token and block. Multiplying: tiles of BLOCK_M tokens and BLOCK_N outputs.

Masks. The last tiles may reach beyond the end; a code that is not there counts as 0.

Memory. Loaded: x once to round it, its codes once for every BLOCK_N outputs and W's once for every BLOCK_M tokens, most
of both from L2. Kept: the sums, BLOCK_M x BLOCK_N float32, and as many of the block's own. Written: x's codes, y.

    bytes = N K + 4 M K + 2 M N          FLOPs = 2 M N K          floor time = FLOPs / (2 * 16-bit peak)

DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 3.3.2, https://arxiv.org/abs/2412.19437
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.quantized import QuantizedMatrix
from mini_infer.kernels.triton.block_walk import product
from mini_infer.kernels.triton.launch import Device

BLOCK = 128
"""Neighbouring inputs that share a scale of x."""

MANY = 64
"""Tokens from which on the arithmetic is the limit."""


@triton.jit
def round_tokens_kernel(x, codes, scales, inputs, x_stride, num_blocks, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = block * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(x + row * x_stride + k, k < inputs, other=0.0).to(tl.float32)
    finite = tl.sum(number * 0.0) == 0.0
    largest = tl.max(tl.abs(number))
    scale = tl.where(finite, largest / LIMIT, float("nan"))
    code = number * tl.where(largest > 1e-36, LIMIT / largest, 0.0)
    if codes.dtype.element_ty == tl.int8:
        code = tl.floor(tl.where(finite, code, 0.0) + 0.5)
    tl.store(codes + row * num_blocks * BLOCK + k, code.to(codes.dtype.element_ty))
    tl.store(scales + row * num_blocks + block, scale)


@triton.jit(do_not_specialize=["num_tokens"])
def w8a8_linear_kernel(
    x,
    x_scales,
    codes,
    scales,
    bias,
    out,
    num_tokens,
    outputs,
    inputs,
    group,
    num_groups,
    num_blocks,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_m, in_n = m < num_tokens, n < outputs
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(num_blocks):
        k = block * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(x + m[:, None] * num_blocks * BLOCK + k[None, :], in_m[:, None], other=0.0)
        weight = tl.load(codes + n[:, None] * inputs + k[None, :], in_n[:, None] & (k < inputs)[None, :], other=0.0)
        if codes.dtype.element_ty == tl.int8:
            dots = tl.dot(token, tl.trans(weight)).to(tl.float32)
        else:
            dots = product(token, tl.trans(weight))
        x_scale = tl.load(x_scales + m * num_blocks + block, in_m, other=0.0)
        scale = tl.load(scales + n * num_groups + block * BLOCK // group, in_n, other=0.0).to(tl.float32)
        sums += dots * (x_scale[:, None] * scale[None, :])
    if HAS_BIAS:
        sums += tl.load(bias + n, in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * outputs + n[None, :], sums, in_m[:, None] & in_n[None, :])


class Config(NamedTuple):
    """Tokens and outputs of one tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def config(device: Device) -> Config:
    """A block of both sides for each of three stages, in shared memory."""
    wide = device.shared_memory >= 160 * 1024
    return Config(128, 64, 8, 3) if wide else Config(64, 64, 4, 2)


def multiply(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, group: int, out: Tensor, device: Device) -> None:
    """Write x Wᵀ + b to `out`; x `[M, K]` with neighbouring features, W's `group` inputs sharing a scale."""
    codes, scales = matrix.codes.contiguous(), matrix.scales.contiguous()
    (num_tokens, inputs), outputs = x.shape, codes.shape[0]
    num_blocks = triton.cdiv(inputs, BLOCK)
    rounded = torch.empty((num_tokens, num_blocks * BLOCK), dtype=codes.dtype, device=x.device)
    x_scales = torch.empty((num_tokens, num_blocks), dtype=torch.float32, device=x.device)
    limit = 127.0 if codes.dtype is torch.int8 else 448.0
    round_tokens_kernel[(num_tokens, num_blocks)](
        x, rounded, x_scales, inputs, x.stride(0), num_blocks, LIMIT=limit, BLOCK=BLOCK, num_warps=1
    )
    tile = config(device)
    grid = triton.cdiv(outputs, tile.block_n), triton.cdiv(num_tokens, tile.block_m)
    w8a8_linear_kernel[grid](
        rounded, x_scales, codes, scales, bias, out, num_tokens, outputs, inputs, group, scales.shape[1], num_blocks,
        HAS_BIAS=bias is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK=BLOCK,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
