"""Matrix products with a quantised weight: its values, multiplied."""

from collections.abc import Callable

import torch
from torch import Tensor

from mini_infer.kernels.quantized import QuantizedMatrix
from mini_infer.kernels.registry import REFERENCE, register


@register("pack_quantized", backend=REFERENCE)
def pack_quantized(
    matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    wide = torch.promote_types(dtype, torch.float32)

    def multiply(x: Tensor) -> Tensor:
        product = x.to(wide) @ matrix.dequantize(wide).T  # each time: it is the codes that are kept
        return (product if bias is None else product + bias).to(dtype)

    def rows(ids: Tensor) -> Tensor:
        return matrix.rows(ids).dequantize(dtype)

    return multiply, rows
