"""A matrix in few bits: what all quantised formats have in common."""

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

ROTATED = 32
"""How many neighbouring inputs are rotated together."""

_HADAMARD = reduce(torch.kron, 5 * [torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)]) / ROTATED**0.5


def rotated(numbers: Tensor) -> Tensor:
    """`[..., inputs]` with each 32 neighbours multiplied by Hadamard's matrix, all of whose entries are 1 or -1, over
    √32: a rotation that is its own inverse. One large number becomes 32 middling ones, which are rounded better.

    Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, 2024, https://arxiv.org/abs/2404.00456
    """
    turned: Tensor = numbers.unflatten(-1, (-1, ROTATED)) @ _HADAMARD.to(numbers)
    return turned.flatten(-2)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A weight `[outputs, inputs]` as small codes, with a scale for each group of neighbouring inputs of an output.

        value[n, k] = scales[n, k // group] * code[n, k] + offsets[n, k // group]

    with `table[code]` in place of the code where there is a table. So one object holds what the formats spell in many
    ways: a zero point z is an offset of -scale * z, a minimum is an offset, a scale for a whole row is a group of all
    inputs, a scale for a block of 128 x 128 is repeated for 128 outputs, and symmetric 4-bit codes have the table
    -8, ..., 7.

    If it is `rotated`, these are the values of a weight whose inputs were; it stands for what they are when rotated
    back. Its product needs no such detour: x Wᵀ is rotated(x) rotated(W)ᵀ.

    Attributes:
        codes: int8 `[outputs, inputs]`; or uint8 `[outputs, inputs / 2]`, two codes from 0 to 15 per byte, that of
            input 2j in the low half of byte j and that of 2j + 1 in the high one; or float8_e4m3fn `[outputs, inputs]`.
        scales: `[outputs, ⌈inputs / group⌉]`, float32, float16 or bfloat16.
        group: how many inputs share a scale; the last group of a row may be shorter.
        offsets: of scales' shape and dtype; None is zeros.
        table: float32 `[16]`, what the 4-bit codes stand for; None is the codes themselves. Only with uint8 codes.
        rotated: see above; inputs are a multiple of `ROTATED`.
    """

    codes: Tensor
    scales: Tensor
    group: int
    offsets: Tensor | None = None
    table: Tensor | None = None
    rotated: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, width = self.codes.shape
        return outputs, width * (2 if self.codes.dtype is torch.uint8 else 1)

    def rows(self, ids: Tensor) -> "QuantizedMatrix":
        """The matrix of the outputs `ids`, `[N]`, in their order."""
        offsets = None if self.offsets is None else self.offsets[ids]
        return replace(self, codes=self.codes[ids], scales=self.scales[ids], offsets=offsets)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, `[outputs, inputs]`, computed in float32 or wider and rounded to `dtype` once."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = self.codes
        if codes.dtype is torch.uint8:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        values = codes.to(wide) if self.table is None else self.table.to(wide)[codes.long()]
        values = values * self._each(self.scales.to(wide))
        if self.offsets is not None:
            values = values + self._each(self.offsets.to(wide))
        return (rotated(values) if self.rotated else values).to(dtype)

    def _each(self, groups: Tensor) -> Tensor:
        """A number of each group, for each of its inputs."""
        return groups.repeat_interleave(self.group, dim=1)[:, : self.shape[1]]
