"""Grades ``product``: by hand, then against the definition, then with the project's parity tests."""

import torch
from torch import Tensor

from mini_infer.kernels import QuantizedMatrix


def close(out: Tensor, wanted: Tensor) -> None:
    assert out is not None, "product returned None · product 返回了 None"
    assert list(out.shape) == list(wanted.shape), (
        f"the result has shape {list(out.shape)}, expected {list(wanted.shape)} · "
        f"结果的形状是 {list(out.shape)}，应为 {list(wanted.shape)}"
    )
    got, right = out.double().flatten(), wanted.double().flatten()
    assert bool(((got - right).abs() <= 1e-5 * (1 + right.abs())).all()), (
        f"got {[round(v, 4) for v in got[:6].tolist()]}, expected {[round(v, 4) for v in right[:6].tolist()]} · "
        f"得到 {[round(v, 4) for v in got[:6].tolist()]}，应为 {[round(v, 4) for v in right[:6].tolist()]}"
    )


def test_int8(answer, explain):
    """int8, one scale for each output · int8，每个输出一个缩放系数"""
    explain(
        "Two outputs, three inputs: codes [[1, 2, 3], [-1, 0, 100]], scales 0.5 and 0.01. For x = [1, 1, 1] the sums "
        "of code * x are 6 and 99, so the result is [3, 0.99].",
        "两个输出、三个输入：编码是 [[1, 2, 3], [-1, 0, 100]]，缩放系数是 0.5 和 0.01。"
        "x = [1, 1, 1] 时，code * x 之和是 6 和 99，所以结果是 [3, 0.99]。",
    )
    codes = torch.tensor([[1, 2, 3], [-1, 0, 100]], dtype=torch.int8)
    matrix = QuantizedMatrix(codes, torch.tensor([[0.5], [0.01]]), 3)
    close(answer.product(torch.ones(1, 3), matrix), torch.tensor([[3.0, 0.99]]))


def test_groups(answer, explain):
    """a scale for each group · 每组一个缩放系数"""
    explain(
        "One output, five inputs in groups of two: all codes are 1, and the three scales are 1, 10 and 100. For "
        "x = [1, 2, 3, 4, 5] the groups' sums are 3, 7 and 5, and each is multiplied with the scale of its own group: "
        "3 + 70 + 500. The last group has one input only: fill it up with zeros.",
        "一个输出、五个输入，每两个输入一组：编码都是 1，三个缩放系数是 1、10 和 100。"
        "x = [1, 2, 3, 4, 5] 时，各组之和是 3、7、5，"
        "每个都乘以自己那一组的缩放系数：3 + 70 + 500。最后一组只有一个输入：用零补齐。",
    )
    matrix = QuantizedMatrix(torch.ones(1, 5, dtype=torch.int8), torch.tensor([[1.0, 10.0, 100.0]]), 2)
    close(answer.product(torch.tensor([[1.0, 2, 3, 4, 5]]), matrix), torch.tensor([[573.0]]))


def test_two_codes_in_a_byte(answer, explain):
    """two codes in a byte · 一个字节两个编码"""
    explain(
        "The bytes 0x21 and 0x43 hold the codes 1, 2, 3, 4: the low four bits are the even input, the high four the "
        "odd one. For x = [1, 10, 100, 1000] and scale 1 the result is 4321.",
        "字节 0x21 和 0x43 里是编码 1、2、3、4：低四位属于偶数号输入，高四位属于奇数号输入。"
        "x = [1, 10, 100, 1000]、缩放系数为 1 时，结果是 4321。",
    )
    matrix = QuantizedMatrix(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), torch.ones(1, 1), 4)
    close(answer.product(torch.tensor([[1.0, 10, 100, 1000]]), matrix), torch.tensor([[4321.0]]))


def test_a_table(answer, explain):
    """a table of sixteen values · 一张十六个值的码表"""
    explain(
        "The same codes 1, 2, 3, 4, with the table -8, -7, ..., 7: what they stand for is -7, -6, -5, -4. For "
        "x = [1, 1, 1, 1] the result is -22.",
        "还是编码 1、2、3、4，码表是 -8、-7、……、7：它们代表 -7、-6、-5、-4。x = [1, 1, 1, 1] 时结果是 -22。",
    )
    codes = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)
    matrix = QuantizedMatrix(codes, torch.ones(1, 1), 4, table=torch.arange(-8.0, 8.0))
    close(answer.product(torch.ones(1, 4), matrix), torch.tensor([[-22.0]]))


def test_offsets(answer, explain):
    """offsets · 偏移"""
    explain(
        "All codes are 0, and the two groups of two inputs have the offsets 1 and 100. Every value is its group's "
        "offset, so for x = [1, 2, 3, 4] the result is 1 * 3 + 100 * 7 = 703: the offset times the sum of x in the "
        "group.",
        "编码都是 0，每两个输入一组，两组的偏移是 1 和 100。每个权重就等于自己那组的偏移，所以 x = [1, 2, 3, 4] 时，"
        "结果是 1 * 3 + 100 * 7 = 703：偏移乘以该组的 x 之和。",
    )
    zeros, ones = torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 2)
    matrix = QuantizedMatrix(zeros, ones, 2, offsets=torch.tensor([[1.0, 100.0]]))
    close(answer.product(torch.tensor([[1.0, 2, 3, 4]]), matrix), torch.tensor([[703.0]]))


def test_many_tokens(answer, explain):
    """many tokens, all at once · 许多词元"""
    explain(
        "Random codes, scales, offsets and x of 7 tokens, compared with x times the dequantised matrix.",
        "7 个词元，编码、缩放系数、偏移和 x 都是随机的，与 x 乘反量化后的矩阵比较。",
    )
    generator = torch.Generator().manual_seed(13)
    codes = torch.randint(0, 256, (24, 40), generator=generator, dtype=torch.uint8)
    scales, offsets = (torch.rand(24, 3, generator=generator) for _ in range(2))
    matrix = QuantizedMatrix(codes, scales, 32, offsets)
    x = torch.randn(7, 80, generator=generator)
    close(answer.product(x, matrix), x.double() @ matrix.dequantize(torch.float64).T)


def test_parity(parity):
    """the project's parity tests · 项目的一致性测试"""
    parity("pack_quantized")
