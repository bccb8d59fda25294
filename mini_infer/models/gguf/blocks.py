"""The block types of GGUF: what is stored, and the `QuantizedMatrix` that it is.

Each reader takes blocks as uint8 ``[N, blocks of a row, bytes of a block]`` and gives their numbers exactly: the
products and sums that ggml computes in float32 when it dequantises are those of `QuantizedMatrix.dequantize`. Four-bit
codes stay in four bits; those of five and six bits become int8, those of two and three become four. Scales are float16
where a block holds them so, and float32 where they are products.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mini_infer.kernels import QuantizedMatrix

DENSE_TYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

SIGNED = torch.arange(-8.0, 8.0)
"""What four-bit codes stand for that are stored with 8 added."""

IQ4_VALUES = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
"""Denser near zero, where most weights are."""

E2M1_VALUES = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Four-bit floating point: a sign, two bits of exponent, one of mantissa."""


def _q8_0(blocks: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(_int8(blocks[..., 2:].view(torch.int8)), _half(blocks, 0), 32)


def _q4_0(blocks: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(_halves(blocks[..., 2:], 16), _half(blocks, 0), 32, table=SIGNED)


def _q4_1(blocks: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(_halves(blocks[..., 4:], 16), _half(blocks, 0), 32, offsets=_half(blocks, 2))


def _q5_0(blocks: Tensor) -> QuantizedMatrix:
    codes = _fields(blocks[..., 6:], 4, 16) | _bit_per_element(blocks[..., 2:6]) << 4
    return QuantizedMatrix(_int8(codes.view(torch.int8) - 16), _half(blocks, 0), 32)


def _q5_1(blocks: Tensor) -> QuantizedMatrix:
    codes = _fields(blocks[..., 8:], 4, 16) | _bit_per_element(blocks[..., 4:8]) << 4
    return QuantizedMatrix(_int8(codes.view(torch.int8)), _half(blocks, 0), 32, offsets=_half(blocks, 2))


def _q2_k(blocks: Tensor) -> QuantizedMatrix:
    both, codes = blocks[..., :16], _fields(blocks[..., 16:80], 2, 32)
    scales = _products(blocks, 80, both & 15)
    return QuantizedMatrix(_pack(codes), scales, 16, offsets=-_products(blocks, 82, both >> 4))


def _q3_k(blocks: Tensor) -> QuantizedMatrix:
    low = _fields(blocks[..., 32:96], 2, 32)
    high = _fields(blocks[..., :32], 1, 32)
    codes = low | high << 2  # a bit that is set says that 4 is not taken away
    packed = blocks[..., 96:108]
    six = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), -1) | _fields(packed[..., 8:], 2, 4) << 4
    scales = _products(blocks, 108, six.view(torch.int8) - 32)
    return QuantizedMatrix(_pack(codes), scales, 16, table=torch.arange(-4.0, 12.0))


def _q4_k(blocks: Tensor) -> QuantizedMatrix:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    offsets = -_products(blocks, 2, minima)
    return QuantizedMatrix(_halves(blocks[..., 16:], 32), _products(blocks, 0, scales), 32, offsets=offsets)


def _q5_k(blocks: Tensor) -> QuantizedMatrix:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    codes = _fields(blocks[..., 48:], 4, 32) | _fields(blocks[..., 16:48], 1, 32) << 4
    offsets = -_products(blocks, 2, minima)
    return QuantizedMatrix(_int8(codes.view(torch.int8)), _products(blocks, 0, scales), 32, offsets=offsets)


def _q6_k(blocks: Tensor) -> QuantizedMatrix:
    codes = _fields(blocks[..., :128], 4, 64) | _fields(blocks[..., 128:192], 2, 32) << 4
    scales = _products(blocks, 208, blocks[..., 192:208].view(torch.int8))
    return QuantizedMatrix(_int8(codes.view(torch.int8) - 32), scales, 16)


def _iq4_nl(blocks: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(_halves(blocks[..., 2:], 16), _half(blocks, 0), 32, table=IQ4_VALUES)


def _iq4_xs(blocks: Tensor) -> QuantizedMatrix:
    low = torch.stack((blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4), -1).flatten(-2)
    high = torch.stack([blocks[..., 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    scales = _products(blocks, 0, (low | high << 4).view(torch.int8) - 32)
    return QuantizedMatrix(_halves(blocks[..., 8:], 16), scales, 32, table=IQ4_VALUES)


def _mxfp4(blocks: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(_halves(blocks[..., 1:], 16), powers_of_two(blocks[..., 0]), 32, table=E2M1_VALUES)


_TYPES: Mapping[int, tuple[str, int, int, Callable[[Tensor], QuantizedMatrix]] | tuple[str, int, int, None] | str] = {
    0: ("F32", 1, 4, None),
    1: ("F16", 1, 2, None),
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    6: ("Q5_0", 32, 22, _q5_0),
    7: ("Q5_1", 32, 24, _q5_1),
    8: ("Q8_0", 32, 34, _q8_0),
    9: "Q8_1",
    10: ("Q2_K", 256, 84, _q2_k),
    11: ("Q3_K", 256, 110, _q3_k),
    12: ("Q4_K", 256, 144, _q4_k),
    13: ("Q5_K", 256, 176, _q5_k),
    14: ("Q6_K", 256, 210, _q6_k),
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: ("IQ4_NL", 32, 18, _iq4_nl),
    21: "IQ3_S",
    22: "IQ2_S",
    23: ("IQ4_XS", 256, 136, _iq4_xs),
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: ("BF16", 1, 2, None),
    34: "TQ1_0",
    35: "TQ2_0",
    39: ("MXFP4", 32, 17, _mxfp4),
    40: "NVFP4",
}
"""By ggml's number: name, elements and bytes of a block, reader; or the name alone, of a type that is not read."""

TYPE_NAMES: Mapping[int, str] = {number: kind if isinstance(kind, str) else kind[0] for number, kind in _TYPES.items()}
_BY_NAME = {kind[0]: kind[1:] for kind in _TYPES.values() if not isinstance(kind, str)}
BLOCK_TYPES = tuple(name for name, (_, _, reader) in _BY_NAME.items() if reader is not None)
"""The quantised ones that are read."""
LAYOUTS: Mapping[str, tuple[int, int]] = {name: kind[:2] for name, kind in _BY_NAME.items()}
"""Elements and bytes of a block of each type that is read."""


def read_blocks(name: str, rows: Tensor) -> QuantizedMatrix:
    """The matrix that rows of blocks are, uint8 ``[N, bytes of a row]``."""
    _, size, reader = _BY_NAME[name]
    assert reader is not None, name
    matrix = reader(rows.unflatten(1, (-1, size)))
    return matrix if matrix.table is None else replace(matrix, table=matrix.table.to(rows.device))


def powers_of_two(exponents: Tensor) -> Tensor:
    """2 ** (e - 127) for uint8 e, in float32: the smallest is subnormal."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)


# ---- parts of a block --------------------------------------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, ``[N, blocks]``."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _products(blocks: Tensor, at: int, factors: Tensor) -> Tensor:
    """The float16 of each block times its small integers, ``[N, blocks * integers]``, in float32."""
    return (_half(blocks, at).float().unsqueeze(-1) * factors).flatten(1)


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Numbers of a few bits, one byte each: of each ``run`` bytes first the lowest bits of all, then the next ones."""
    runs = packed.unflatten(-1, (-1, 1, run))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    fields: Tensor = runs >> shifts & (1 << bits) - 1
    return fields.flatten(-3)


def _bit_per_element(packed: Tensor) -> Tensor:
    """The bits of each byte, lowest first, one byte each."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)


def _halves(packed: Tensor, run: int) -> Tensor:
    """Four-bit codes, of which each ``run`` bytes hold first the low halves' and then the high halves', as neighbours
    in a byte: ``[N, inputs / 2]``."""
    even, odd = packed.unflatten(-1, (-1, run))[..., 0::2], packed.unflatten(-1, (-1, run))[..., 1::2]
    low, high = even & 15 | odd << 4, even >> 4 | odd & 0xF0
    return torch.stack((low, high), -2).flatten(1)


def _pack(codes: Tensor) -> Tensor:
    """One code per byte as two codes per byte."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).flatten(1)


def _int8(codes: Tensor) -> Tensor:
    return codes.flatten(1).contiguous()


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits from twelve bytes: the first four of each have a byte of their own,
    whose top two bits belong to the other four."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 2 & 48), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 2 & 48), -1)
    return scales, minima
