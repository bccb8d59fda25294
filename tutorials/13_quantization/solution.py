"""Chapter 13: multiply with weights in few bits. Fill in the body of product; what registers it is done.
---
第 13 章：用位数很少的权重做乘法。填写 product 的函数体；注册的部分已经写好。
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mini_infer.kernels import QuantizedMatrix, register
from mini_infer.kernels.quantized import rotated


def product(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """x [tokens, inputs] times the matrix [outputs, inputs], without making its values.

    There is one multiplication by a scale for each group, none for each weight: a value is scale * code + offset, and a
    group of inputs shares scale and offset. So a group adds to an output

        scale * (sum of code * x)  +  offset * (sum of x)

    matrix.codes:   int8 or float8_e4m3fn [outputs, inputs]; or uint8 [outputs, inputs / 2], two codes in a byte:
                    that of input 2j in the low four bits of byte j, that of input 2j + 1 in the high four
    matrix.table:   None, or 16 numbers: what the four-bit codes stand for
    matrix.scales:  [outputs, groups]
    matrix.offsets: None, or as the scales
    matrix.group:   inputs of a group; the last one may be shorter

    To do, in this order:
    1. the codes, one number per input, in the dtype of wide
    2. fill x and the codes up with zeros (pad), so that every group is complete, and cut both into groups (unflatten)
    3. the sum of code * x in each group: [tokens, outputs, groups] (torch.einsum)
    4. times the scales, added up over the groups; and the offsets, if there are any
    ---
    x [tokens, inputs] 乘矩阵 [outputs, inputs]，不还原出每个权重。

    缩放系数每组只乘一次，而不是每个权重乘一次：一个权重是 scale * code + offset，同一组输入共用缩放系数和偏移。
    所以一组对一个输出的贡献是

        scale *（code * x 之和）+ offset *（x 之和）

    matrix.codes：   int8 或 float8_e4m3fn [outputs, inputs]；或 uint8 [outputs, inputs / 2]，一个字节两个编码：
                    字节 j 的低四位属于输入 2j，高四位属于输入 2j + 1
    matrix.table：   None，或 16 个数：四位编码各代表什么
    matrix.scales：  [outputs, groups]
    matrix.offsets： None，或与缩放系数形状相同
    matrix.group：   一组有多少个输入；最后一组可能短一些

    依次要做的事：
    1. 编码，每个输入一个数，类型与 wide 相同
    2. 用零把 x 和编码补齐（pad），使每一组都完整，再把两者切成组（unflatten）
    3. 每一组里 code * x 之和：[tokens, outputs, groups]（torch.einsum）
    4. 乘以缩放系数，各组相加；有偏移的话，再加上偏移的部分
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # hole
    codes = matrix.codes
    if codes.dtype is torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    numbers = codes.to(wide.dtype) if matrix.table is None else matrix.table.to(wide.dtype)[codes.long()]
    missing = -x.shape[1] % matrix.group
    grouped_x = pad(wide, (0, missing)).unflatten(1, (-1, matrix.group))
    grouped_codes = pad(numbers, (0, missing)).unflatten(1, (-1, matrix.group))
    sums = torch.einsum("tgk,ngk->tng", grouped_x, grouped_codes)
    result = (sums * matrix.scales.to(wide.dtype)).sum(-1)
    if matrix.offsets is not None:
        result = result + grouped_x.sum(-1) @ matrix.offsets.to(wide.dtype).T
    return result
    # end


# As in chapter 10: the backend "mine" now has this product. · 与第 10 章相同：从此后端 mine 有了这个乘法。
@register("pack_quantized", backend="mine")
def pack_quantized(matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype):
    """Give two functions: the product of any x, and rows of the matrix.
    ---
    返回两个函数：任意 x 的乘法，以及取矩阵的若干行。
    """

    def multiply(x: Tensor) -> Tensor:
        if matrix.rotated:  # its inputs were turned, and so x is, too · 它的输入旋转过，x 也要旋转
            x = rotated(x.to(torch.promote_types(dtype, torch.float32)))
        result = product(x.reshape(-1, x.shape[-1]), matrix)
        if bias is not None:
            result = result + bias.to(result.dtype)
        return result.to(dtype).view(*x.shape[:-1], len(matrix.scales))

    return multiply, lambda ids: matrix.rows(ids).dequantize(dtype)
