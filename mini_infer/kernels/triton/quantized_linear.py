"""A product with a quantised weight: y = x Wᵀ + b, where W arrives in 8 or 4 bits and becomes numbers in registers.

The idea. A few tokens leave the arithmetic units idle while the weight comes from memory, so the weight's bytes are the
time. They are read as they lie in the checkpoint, and turned into bfloat16 just before the tensor cores want them: an
int8 or a float8 is converted, a byte of two codes is masked and shifted, and each is multiplied by its group's scale.

    codes [N, K / 2 bytes]                          x [M, K]
              BLOCK_B bytes                  even places:  ░ ░ ░ ░   odd places:  ▒ ▒ ▒ ▒
            ├────────────┤
    BLOCK_N │ ▒░ ▒░ ▒░ ▒░│ · scale[n, group]    sums += ░ x ░ᵀ, the low halves; sums += ▒ x ▒ᵀ, the high ones
            ├────────────┤

A byte's low half belongs to an even input and its high half to the odd one after it. Instead of putting them into one
row again, each half is multiplied with the x that it belongs to; a sum does not mind the order.

Grid. Tiles of BLOCK_M tokens and BLOCK_N outputs; the tiles of one weight beside each other, so that x stays in L2.
With few tokens there are fewer tiles than multiprocessors, and each would walk all of K alone, waiting for memory. So K
is *split*, too: several programs share a tile, each writes its own partial sum in float32, and a second kernel adds
them, in a fixed order, so that a result never depends on who came first.

Masks. The last tile of tokens, outputs or inputs may reach beyond the end: those codes are neither read nor counted.

Memory. Loaded: codes and scales, once for every BLOCK_M tokens; x, once for every BLOCK_N outputs, from L2. Kept: the
sums, BLOCK_M x BLOCK_N float32. Written: y. With c bits per code, a group of g, M tokens and few of them:

    bytes = N K (c / 8 + 2 / g) + 2 M (K + N)          FLOPs = 2 M N K          floor time = bytes / copy bandwidth

Frantar et al., MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models, 2024,
https://arxiv.org/abs/2408.11743. Hoque et al., Accelerating a Triton Fused Kernel for W4A16 Quantized Inference with
SplitK work decomposition, 2024, https://arxiv.org/abs/2402.00025
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.quantized import QuantizedMatrix
from mini_infer.kernels.reference import quantized as reference
from mini_infer.kernels.triton import w8a8_linear
from mini_infer.kernels.triton.block_walk import product
from mini_infer.kernels.triton.codes import decoded
from mini_infer.kernels.triton.launch import Device, device_of, register_launcher, rows


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def quantized_linear_kernel(
    x,
    codes,
    scales,
    offsets,
    table,
    bias,
    out,
    num_tokens,
    outputs,
    inputs,
    group,
    num_groups,
    x_stride,
    zero,
    steps,
    KIND: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    GROUPS: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(2)
    HALVES: tl.constexpr = 1 if KIND == "int8" or KIND == "fp8" else 2
    width = inputs // HALVES
    numbers = x.dtype.element_ty
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(width, BLOCK_B))):
        byte = step * BLOCK_B + tl.arange(0, BLOCK_B)
        inside = (n < outputs)[:, None] & (byte < width)[None, :]
        code = tl.load(codes + n[:, None] * width + byte[None, :], inside, other=0)
        of = step * BLOCK_B * HALVES // group + tl.arange(0, GROUPS)
        known = (n < outputs)[:, None] & (of < num_groups)[None, :]
        scale = tl.load(scales + n[:, None] * num_groups + of[None, :], known, other=0.0).to(tl.float32)
        if HAS_OFFSETS:
            offset = tl.load(offsets + n[:, None] * num_groups + of[None, :], known, other=0.0).to(tl.float32)

        for half in tl.static_range(HALVES):
            if KIND == "int8" or KIND == "fp8":
                value = decoded(code, KIND)
                if KIND == "fp8":
                    value = tl.where(code & 0x7F == 0x7F, float("nan"), value)
            else:
                number = ((code >> (4 * half)) & 15).to(tl.int32)
                value = tl.load(table + number) if KIND == "table" else (number - zero).to(tl.float32)
            value = tl.reshape(value, (BLOCK_N, GROUPS, BLOCK_B // GROUPS)) * scale[:, :, None]
            if HAS_OFFSETS:
                value += offset[:, :, None]
            weight = tl.reshape(value, (BLOCK_N, BLOCK_B)).to(numbers)

            k = byte * HALVES + half
            there = (m < num_tokens)[:, None] & (k < inputs)[None, :]
            token = tl.load(x + m[:, None] * x_stride + k[None, :], there, other=0.0)
            sums = product(token, tl.trans(weight), sums)

    inside = (m < num_tokens)[:, None] & (n < outputs)[None, :]
    if SPLIT:
        tl.store(out + (split.to(tl.int64) * num_tokens + m[:, None]) * outputs + n[None, :], sums, inside)
    else:
        if HAS_BIAS:
            sums += tl.load(bias + n, n < outputs, other=0.0).to(tl.float32)[None, :]
        tl.store(out + m[:, None] * outputs + n[None, :], sums, inside)


@triton.jit(do_not_specialize=["total", "splits"])
def add_splits_kernel(partial, bias, out, total, splits, outputs, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        sums += tl.load(partial + split * total + place, inside, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + place % outputs, inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums, inside)


class Config(NamedTuple):
    """Tokens, outputs and bytes of codes of one tile."""

    block_m: int
    block_n: int
    block_b: int
    num_warps: int
    num_stages: int


def config(num_tokens: int, bits: int, itemsize: int, device: Device) -> Config:
    """Few tokens: narrow tiles, of which there are many. Many tokens: large ones, in which a weight is used more often.

    Products on tensor cores begin with 16 rows and 16 columns, and 64 bytes are a fair share of a row; without them a
    thread holds both factors in registers, and tiles are small.
    """
    block_m = min(64, max(16, triton.next_power_of_2(num_tokens)))
    if itemsize == 4 or not device.tensor_cores:
        return Config(min(32, block_m), 32, bits * 4, 4, 3)
    block_n = 32 if bits == 4 and block_m == 16 else 64  # taking bytes apart needs registers
    return Config(block_m, block_n, bits * 8, 4, 3)


def num_splits(tiles: int, num_steps: int, device: Device) -> int:
    """As many as give each multiprocessor two programs, of at least four steps each."""
    return max(1, min(2 * device.num_sms // tiles, num_steps // 4))


def fits(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
    """A group is one of the tile's powers of two, or a row; and nothing is rotated, which nobody does for GPUs."""
    outputs, inputs = matrix.shape
    halves = 2 if matrix.codes.dtype is torch.uint8 else 1
    power = matrix.group % (8 * halves) == 0 and triton.next_power_of_2(matrix.group) == matrix.group
    return (
        not matrix.rotated
        and dtype is not torch.float64
        and outputs > 0
        and inputs > 0
        and (power or matrix.group >= inputs)
    )


def pack_quantized(
    matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    multiply, of_rows = reference.pack_quantized(matrix, bias, dtype)
    return (_Product(matrix, bias, dtype) if fits(matrix, dtype) else multiply), of_rows


class _Product:
    """x Wᵀ + b with W as it is."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._shape, inputs = matrix.shape, matrix.shape[1]
        self._kind, self._zero = kind_of(matrix)
        self._halves = 1 if self._kind in ("int8", "fp8") else 2
        self._group = matrix.group if matrix.group < inputs else triton.next_power_of_2(inputs)
        self._num_groups = matrix.scales.shape[1]
        self._itemsize = dtype.itemsize
        self._has = {"HAS_OFFSETS": matrix.offsets is not None, "HAS_BIAS": bias is not None}
        whole = matrix.group >= inputs or matrix.group % w8a8_linear.BLOCK == 0
        self._matrix, self._bias = matrix, bias
        self._both_in_8_bits = self._halves == 1 and matrix.offsets is None and whole and dtype.itemsize == 2
        codes = matrix.codes.view(torch.uint8) if self._kind == "fp8" else matrix.codes
        self._arrays = [
            None if array is None else array.contiguous()
            for array in (codes, matrix.scales, matrix.offsets, matrix.table, bias)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        outputs, inputs = self._shape
        out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
        if out.numel() == 0:
            return out
        x = rows(x)
        num_tokens = len(x)
        device = device_of(x)
        multiplies = device.tensor_cores if self._kind == "int8" else device.float8
        if num_tokens >= w8a8_linear.MANY and self._both_in_8_bits and multiplies:
            with torch.cuda.device_of(x):
                w8a8_linear.multiply(x, self._matrix, self._bias, self._group, out, device)
            return out
        tile = config(num_tokens, 8 // self._halves, self._itemsize, device)
        tiles = triton.cdiv(outputs, tile.block_n), triton.cdiv(num_tokens, tile.block_m)
        num_steps = triton.cdiv(inputs // self._halves, tile.block_b)
        splits = num_splits(tiles[0] * tiles[1], num_steps, device)
        partial = out if splits == 1 else out.new_empty((splits, num_tokens, outputs), dtype=torch.float32)
        with torch.cuda.device_of(x):
            quantized_linear_kernel[(*tiles, splits)](
                x, *self._arrays, partial, num_tokens, outputs, inputs, self._group, self._num_groups, x.stride(0),
                self._zero, triton.cdiv(num_steps, splits),
                **self._has, **constexprs(tile, self._kind, self._group, splits > 1),
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            if splits > 1:
                total = num_tokens * outputs
                add_splits_kernel[(triton.cdiv(total, ADDED),)](
                    partial, self._arrays[-1], out, total, splits, outputs, HAS_BIAS=self._has["HAS_BIAS"], BLOCK=ADDED
                )
        return out


ADDED = 1024
"""Numbers of one program that adds partial sums."""


def constexprs(tile: Config, kind: str, group: int, split: bool) -> dict[str, Any]:
    """What of a launch the compiler gets to know, besides which arrays there are."""
    halves = 1 if kind in ("int8", "fp8") else 2
    return {
        "KIND": kind,
        "SPLIT": split,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_B": tile.block_b,
        "GROUPS": max(1, tile.block_b * halves // group),
    }


def kind_of(matrix: QuantizedMatrix) -> tuple[str, int]:
    """How codes become numbers, and what is taken from each."""
    if matrix.codes.dtype is not torch.uint8:
        return ("int8" if matrix.codes.dtype is torch.int8 else "fp8"), 0
    if matrix.table is None:
        return "int4", 0
    table = matrix.table.tolist()
    is_run = table[0].is_integer() and table == [table[0] + code for code in range(16)]
    return ("int4", -int(table[0])) if is_run else ("table", 0)


register_launcher("pack_quantized", pack_quantized)
