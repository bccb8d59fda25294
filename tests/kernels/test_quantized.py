"""Products with quantised weights, against float64; the weight's values spelled out one by one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mini_infer import kernels
from mini_infer.exceptions import KernelError
from mini_infer.kernels import QuantizedMatrix

from .truth import DTYPES, draw, on_backends, strided

TABLES = {
    "symmetric": torch.arange(-8.0, 8.0),
    "iq4_nl": torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0]),
    "mxfp4": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]),
    "any numbers": draw(5, 16, dtype=torch.float32),
}
KINDS = ["int8", "int4", "fp8", *TABLES]


def matrix(
    kind: str,
    outputs: int,
    inputs: int,
    group: int,
    offsets: bool = False,
    scales: torch.dtype = torch.float32,
    seed: int = 0,
) -> QuantizedMatrix:
    """Random codes; scales from 0.5 to 1.5 times what gives values around 1."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "int8":
        codes = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    elif kind == "fp8":
        codes = torch.randn(outputs, inputs, generator=generator).mul(50).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8)
    shape = (outputs, -(-inputs // group))
    size = {"int8": 1 / 64, "fp8": 1 / 50, "iq4_nl": 1 / 64}.get(kind, 1 / 4)
    return QuantizedMatrix(
        codes,
        (size * (0.5 + torch.rand(shape, generator=generator))).to(scales),
        group,
        (0.3 * torch.randn(shape, generator=generator)).to(scales) if offsets else None,
        TABLES.get(kind),
    )


def values(matrix: QuantizedMatrix) -> Tensor:
    """The definition, one number at a time, in float64."""
    outputs, inputs = matrix.shape
    result = torch.empty(outputs, inputs, dtype=torch.float64)
    for n in range(outputs):
        for k in range(inputs):
            if matrix.codes.dtype is torch.uint8:
                code = int(matrix.codes[n, k // 2]) >> (4 if k % 2 else 0) & 15
                value = float(code if matrix.table is None else matrix.table[code])
            else:
                value = float(matrix.codes[n, k])
            offset = 0.0 if matrix.offsets is None else float(matrix.offsets[n, k // matrix.group])
            result[n, k] = float(matrix.scales[n, k // matrix.group]) * value + offset
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offsets", [False, True], ids=["", "offsets"])
@pytest.mark.parametrize("group", [4, 16, 40], ids="group {}".format)
def test_what_the_codes_stand_for(kind: str, offsets: bool, group: int) -> None:
    """Also where the last group is shorter than the others."""
    given = matrix(kind, 5, 40, group, offsets)
    truth = values(given)
    assert given.shape == (5, 40)
    assert torch.equal(given.dequantize(torch.float64), truth)
    torch.testing.assert_close(given.dequantize(), truth.float(), rtol=3e-7, atol=3e-7)
    assert given.dequantize(torch.bfloat16).dtype is torch.bfloat16
    ids = torch.tensor([4, 0, 0])
    assert torch.equal(given.rows(ids).dequantize(torch.float64), truth[ids])


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Of a token's row, as of all operations: an x rounded to 8 bits in groups of 32 stays within it."""


def check_product(
    given: QuantizedMatrix, tokens: int, dtype: torch.dtype, bias: bool = False, slack: float = 1
) -> None:
    outputs, inputs = given.shape
    x = draw(1, tokens, inputs, dtype=dtype)
    b = draw(3, outputs, dtype=dtype) if bias else None
    product = kernels.pack_quantized(given, b, dtype)
    y = product(x)
    assert y.dtype == dtype and y.shape == (tokens, outputs)
    weight = given.dequantize(torch.float64)
    truth = x.double() @ weight.T + (0 if b is None else b.double())
    # A row of few outputs may cancel to almost nothing; the size of its terms is what rounding goes by.
    size = torch.maximum(truth.norm(dim=1), (x.double().square() @ weight.square().T).sum(1).sqrt())
    error = (y.double() - truth).norm(dim=1) / size
    # Where all weights have one sign, a rounded x errs alike in all outputs.
    if given.codes.dtype is torch.uint8 and given.table is None and given.offsets is None:
        slack = 3
    assert (error < slack * TOLERANCE[dtype]).all(), float(error.max())


SHAPES = [(200, 96, 32), (65, 40, 16), (33, 256, 256), (3, 8, 8), (70, 100, 12), (20, 1024, 64)]
"""outputs, inputs, group: also what is no multiple of a panel, a vector or a group."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@on_backends("pack_quantized")
def test_products(backend: str, kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for tokens in (1, 13):
        check_product(matrix(kind, *shape), tokens, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends("pack_quantized")
def test_numbers_of_tokens(backend: str, dtype: torch.dtype) -> None:
    for kind in ("int8", "symmetric"):
        for tokens in (0, 5, 6, 7, 400 if dtype is torch.bfloat16 else 100):
            check_product(matrix(kind, 70, 64, 32), tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "symmetric"])
@on_backends("pack_quantized")
def test_offsets_and_biases(backend: str, kind: str, scales: torch.dtype, dtype: torch.dtype) -> None:
    for offsets, bias in ((True, False), (False, True), (True, True)):
        check_product(matrix(kind, 100, 96, 32, offsets, scales), 9, dtype, bias)


@on_backends("pack_quantized")
def test_many_tokens_and_large_groups(backend: str) -> None:
    """Where x may be rounded to 8 bits of the codes' kind: float8 leaves 4 of them, and errs by 1/16 at most."""
    check_product(matrix("int8", 70, 300, 300), 70, torch.bfloat16)
    check_product(matrix("fp8", 70, 300, 128), 70, torch.bfloat16, bias=True, slack=5)


@on_backends("pack_quantized")
def test_leading_shapes_and_strides(backend: str) -> None:
    given, x = matrix("int8", 70, 40, 8), draw(1, 2, 3, 40, dtype=torch.float32)
    truth = x.double() @ given.dequantize(torch.float64).T
    product = kernels.pack_quantized(given, None, torch.float32)
    for y, wanted in ((product(strided(x)), truth), (product(x.transpose(0, 1)), truth.transpose(0, 1))):
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@on_backends("pack_quantized")
def test_rows_of_the_weight(backend: str, kind: str, shape: tuple[int, int, int]) -> None:
    """The very numbers, as an embedding wants them; in bfloat16 scales and offsets may have been float16 before."""
    given = matrix(kind, *shape, offsets=True)
    ids = torch.tensor([0, shape[0] - 1, 1, 1, shape[0] // 2])
    for dtype in DTYPES:
        rows, truth = kernels.pack_quantized(given, None, dtype).rows, given.dequantize(dtype)[ids]
        assert rows(ids).dtype == dtype
        if dtype is torch.bfloat16:
            torch.testing.assert_close(rows(ids), truth, rtol=2**-7, atol=2**-9)
        else:
            assert torch.equal(rows(ids), truth)
        assert rows(ids[:0]).shape == (0, shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_backends("pack_quantized")
def test_what_is_not_finite_stays_in_its_row(backend: str, dtype: torch.dtype) -> None:
    x = draw(1, 9, 64, dtype=dtype)
    x[4, 3], x[6, 40] = torch.nan, torch.inf
    y = kernels.pack_quantized(matrix("int8", 100, 64, 32), None, dtype)(x)
    assert y.isfinite().all(-1).tolist() == [row not in (4, 6) for row in range(9)]
    assert not y[[4, 6]].isfinite().any()


@on_backends("pack_quantized")
def test_large_and_small_numbers(backend: str) -> None:
    given = matrix("symmetric", 100, 64, 32)
    product = kernels.pack_quantized(given, None, torch.bfloat16)
    for size in (1e-30, 1e-6, 1e6, 1e30):
        x = size * draw(1, 5, 64, dtype=torch.bfloat16)
        truth = x.double() @ given.dequantize(torch.float64).T
        assert float((product(x).double() - truth).norm() / truth.norm()) < 1e-2
    assert not product(torch.zeros(2, 64, dtype=torch.bfloat16)).any()


def hadamard(size: int) -> Tensor:
    """The definition: 1 where the two numbers have an even number of bits in common, else -1; over √32."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    return torch.block_diag(*(size // 32) * [torch.tensor(signs, dtype=torch.float64) / 32**0.5])


def test_what_is_rotated_stands_for_what_it_was() -> None:
    for kind in KINDS:
        given = matrix(kind, 5, 96, 32)
        turned, truth = replace(given, rotated=True), values(given) @ hadamard(96)
        torch.testing.assert_close(turned.dequantize(torch.float64), truth, rtol=0, atol=1e-13)
        torch.testing.assert_close(turned.rows(torch.tensor([4, 0])).dequantize(torch.float64), truth[[4, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [16, 32, 96])
@pytest.mark.parametrize("kind", ["int8", "symmetric", "fp8"])
@on_backends("pack_quantized")
def test_rotated_products(backend: str, kind: str, group: int, dtype: torch.dtype) -> None:
    given = replace(matrix(kind, 70, 96, group), rotated=True)
    for tokens in (1, 13):
        check_product(given, tokens, dtype)
    ids, rows = torch.tensor([69, 0, 3]), kernels.pack_quantized(given, None, dtype).rows
    torch.testing.assert_close(rows(ids), given.dequantize(dtype)[ids], rtol=2**-7, atol=1e-5)


@on_backends("pack_quantized")
def test_a_rotation_spreads_what_stands_out(backend: str) -> None:
    """One number 300 times as large as its neighbours leaves these a bit or two where it is alone."""
    x = draw(1, 9, 64, dtype=torch.bfloat16)
    x[:, 7] = 300
    x[4, 40], x[6, 3] = torch.nan, torch.inf
    given = replace(matrix("int8", 100, 64, 32), rotated=True)
    y, truth = (
        kernels.pack_quantized(given, None, torch.bfloat16)(x).double(),
        x.double() @ given.dequantize().T.double(),
    )
    finite = [row not in (4, 6) for row in range(9)]
    assert y.isfinite().all(-1).tolist() == finite and not y[[4, 6]].isfinite().any()
    assert float((y[finite] - truth[finite]).norm() / truth[finite].norm()) < 5e-3


def test_an_x_that_does_not_fit() -> None:
    product = kernels.pack_quantized(matrix("int4", 5, 8, 4), None, torch.bfloat16)
    with pytest.raises(KernelError, match=r"linear: x must be bfloat16 \[\.\.\., 8\] on cpu; got float32 \[3, 8\]"):
        product(draw(2, 3, 8, dtype=torch.float32))
