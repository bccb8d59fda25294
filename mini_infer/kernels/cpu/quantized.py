"""Matrix products with quantised weights.

    y[m, n] = Σ_k x[m, k] * value[n, k] + bias[n]

There are two ways through the weight's `panels`: bfloat16 x and codes that are integers are multiplied as integers
(`integer_product`), everything else as numbers (`value_product`).

Bytes: the codes and scales, once. Floor: those / memory bandwidth for a few tokens, 2 * M * N * K / peak for many.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mini_infer.kernels.cpu import integer_tile as integers
from mini_infer.kernels.cpu.integer_product import IntegerProduct, is_run
from mini_infer.kernels.cpu.jit import ELEMENTS
from mini_infer.kernels.cpu.panels import Panels, Rows
from mini_infer.kernels.cpu.value_product import ValueProduct
from mini_infer.kernels.quantized import ROTATED, QuantizedMatrix
from mini_infer.kernels.reference import quantized as reference
from mini_infer.kernels.registry import register


@register("pack_quantized", backend="cpu", devices=["cpu"], priority=10)
def pack_quantized(
    matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    outputs, inputs = matrix.shape
    whole_row = matrix.group >= inputs
    unit = ROTATED if matrix.rotated else 8
    if dtype not in ELEMENTS or 0 in (outputs, inputs) or not (whole_row or matrix.group % unit == 0):
        return reference.pack_quantized(matrix, bias, dtype)
    bias = None if bias is None else bias.contiguous()
    integer = _as_integers(matrix) if dtype is torch.bfloat16 else None
    panels = Panels.of_matrix(integer or matrix, half=integer is not None)
    product = ValueProduct(panels, bias, dtype) if integer is None else IntegerProduct(panels, bias)
    return product, Rows(panels, dtype)


def _as_integers(matrix: QuantizedMatrix) -> QuantizedMatrix | None:
    """The same matrix, all of whose codes stand for integers of 8 bits; None if there is no such."""
    if matrix.codes.dtype is torch.float8_e4m3fn:
        return None
    if matrix.table is None:
        return matrix
    for factor in (1, 2, 4, 8):  # a power of two can be moved from the scales to the table: nothing is rounded
        table = matrix.table * factor
        if torch.equal(table, table.round().clamp(-128, 127)) and (integers.PERMUTES or is_run(table)):
            return replace(matrix, table=table, scales=matrix.scales / factor)
    return None
