"""Packed products, against float64."""

import pytest
import torch

from mini_infer import kernels
from mini_infer.exceptions import KernelError

from .truth import DTYPES, check, draw, on_backends, strided


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 6, 7, 13, 385])
@pytest.mark.parametrize("features", [(64, 64), (96, 200), (1, 1), (33, 65), (2, 130)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@on_backends("pack_linear")
def test_products(backend: str, tokens: int, features: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    inputs, outputs = features
    x, weight = draw(1, tokens, inputs, dtype=dtype), draw(2, outputs, inputs, dtype=dtype)
    b = draw(3, outputs, dtype=dtype) if bias else None
    y = kernels.pack_linear(weight, b)(x)
    assert y.dtype == dtype and y.shape == (tokens, outputs)
    truth = x.double() @ weight.double().T + (0 if b is None else b.double())
    # A single output may cancel to almost nothing; the size of its terms is what rounding goes by.
    terms = x.double().abs() @ weight.double().abs().T + (0 if b is None else b.double().abs())
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 1e-2)
    assert ((y.double() - truth).abs() <= tolerance * terms).all()


@on_backends("pack_linear")
def test_leading_shapes_and_strides(backend: str) -> None:
    x, weight = draw(1, 2, 3, 40), draw(2, 70, 40)
    truth = x.double() @ weight.double().T
    check(kernels.pack_linear(weight)(x), truth, torch.float64)
    check(kernels.pack_linear(strided(weight))(strided(x)), truth, torch.float64)
    bias = draw(3, 140, dtype=torch.float32)[::2]
    wide = kernels.pack_linear(weight.float(), bias)(x.float())
    check(wide, x.float().double() @ weight.float().double().T + bias.double(), torch.float32)
    check(kernels.pack_linear(weight.T.contiguous().T)(x.transpose(0, 1)), truth.transpose(0, 1), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [(64, 64), (96, 200), (33, 65), (2, 130)], ids=str)
@on_backends("pack_linear")
def test_rows_of_the_weight(backend: str, features: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, outputs = features
    weight = draw(4, outputs, inputs, dtype=dtype)
    ids = torch.tensor([0, outputs - 1, 3, 3, outputs // 2])
    assert torch.equal(kernels.pack_linear(weight).rows(ids), weight[ids])
    assert kernels.pack_linear(weight).rows(ids[:0]).shape == (0, inputs)


@on_backends("pack_linear")
def test_a_nan_stays_in_its_row(backend: str) -> None:
    x = draw(1, 9, 64)
    x[4, 3] = torch.nan
    y = kernels.pack_linear(draw(2, 100, 64))(x)
    assert y.isnan().all(-1).tolist() == [row == 4 for row in range(9)]


def test_an_x_that_does_not_fit() -> None:
    packed = kernels.pack_linear(draw(1, 5, 8, dtype=torch.float32))
    with pytest.raises(KernelError, match=r"linear: x must be float32 \[\.\.\., 8\] on cpu; got float32 \[3, 7\]"):
        packed(draw(2, 3, 7, dtype=torch.float32))
    with pytest.raises(KernelError, match="linear: x must be float32"):
        packed(draw(2, 3, 8, dtype=torch.float64))
