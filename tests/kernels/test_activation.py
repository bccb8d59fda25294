import math

import pytest
import torch
from torch.nn.functional import silu

from mini_infer import kernels

from .truth import DTYPES, check, draw, on_backends, strided


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (1, 14), (5, 66), (2, 3, 128), (0, 8), (3, 0)], ids=str)
@on_backends("silu_and_mul")
def test_silu_and_mul_is_the_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * draw(1, *shape)).to(dtype)
    half = shape[-1] // 2
    truth = torch.empty(*shape[:-1], half, dtype=torch.float64)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in truth.shape]).view(-1, truth.dim()).tolist():
        *row, i = index
        gate, up = float(x[(*row, i)]), float(x[(*row, half + i)])
        truth[tuple(index)] = gate / (1 + math.exp(-gate)) * up
    check(kernels.silu_and_mul(x), truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_backends("silu_and_mul")
def test_silu_and_mul_rounds_like_transformers(backend: str, dtype: torch.dtype) -> None:
    if backend != "reference":
        pytest.skip("only the specification promises the last bit")
    gate, up = draw(2, 16, 96, dtype=dtype), draw(3, 16, 96, dtype=dtype)
    assert torch.equal(kernels.silu_and_mul(torch.cat((gate, up), -1)), silu(gate) * up)


@on_backends("silu_and_mul")
def test_silu_and_mul_far_out(backend: str) -> None:
    x = torch.tensor([-1000.0, 1000.0, -90.0, 0.0, 2.0, 2.0, 2.0, 2.0])
    assert torch.allclose(kernels.silu_and_mul(x), torch.tensor([0.0, 2000.0, 0.0, 0.0]))


@on_backends("silu_and_mul")
def test_silu_and_mul_of_strided_tensors(backend: str) -> None:
    x = draw(4, 6, 40)
    gate, up = x[:, :20], x[:, 20:]
    check(kernels.silu_and_mul(strided(x)), gate * gate.sigmoid() * up, torch.float64)
    check(kernels.silu_and_mul(x.T.contiguous().T), gate * gate.sigmoid() * up, torch.float64)
