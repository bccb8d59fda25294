"""A matrix in few bits: what all quantised formats have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A weight `[outputs, inputs]` as small codes, with a scale for each group of neighbouring inputs of an output.

        value[n, k] = scales[n, k // group] * code[n, k] + offsets[n, k // group]

    with `table[code]` in place of the code where there is a table. So one object holds what the formats spell in many
    ways: a zero point z is an offset of -scale * z, a minimum is an offset, a scale for a whole row is a group of all
    inputs, a scale for a block of 128 x 128 is repeated for 128 outputs, and symmetric 4-bit codes have the table
    -8, ..., 7.

    Attributes:
        codes: int8 `[outputs, inputs]`; or uint8 `[outputs, inputs / 2]`, two codes from 0 to 15 per byte, that of
            input 2j in the low half of byte j and that of 2j + 1 in the high one; or float8_e4m3fn `[outputs, inputs]`.
        scales: `[outputs, ⌈inputs / group⌉]`, float32, float16 or bfloat16.
        group: how many inputs share a scale; the last group of a row may be shorter.
        offsets: of scales' shape and dtype; None is zeros.
        table: float32 `[16]`, what the 4-bit codes stand for; None is the codes themselves. Only with uint8 codes.
    """

    codes: Tensor
    scales: Tensor
    group: int
    offsets: Tensor | None = None
    table: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, width = self.codes.shape
        return outputs, width * (2 if self.codes.dtype is torch.uint8 else 1)

    def rows(self, ids: Tensor) -> "QuantizedMatrix":
        """The matrix of the outputs `ids`, `[N]`, in their order."""
        offsets = None if self.offsets is None else self.offsets[ids]
        return QuantizedMatrix(self.codes[ids], self.scales[ids], self.group, offsets, self.table)

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
        return values.to(dtype)

    def _each(self, groups: Tensor) -> Tensor:
        """A number of each group, for each of its inputs."""
        return groups.repeat_interleave(self.group, dim=1)[:, : self.shape[1]]
