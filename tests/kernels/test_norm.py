import pytest
import torch
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mini_infer import kernels

from .truth import DTYPES, check, check_sum, draw, on_backends, strided

SHAPES = [(1,), (7,), (1, 1), (5, 64), (3, 129), (2, 3, 4, 33), (0, 16), (2, 0, 16), (2, 4096)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_backends("rmsnorm")
def test_rmsnorm_is_the_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(1, *shape, dtype=dtype), draw(2, shape[-1], dtype=dtype)
    out = kernels.rmsnorm(x, weight, 1e-5)
    check(out, rms_norm(x.double(), (shape[-1],), weight.double(), 1e-5), dtype)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 200.0, 30000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends("rmsnorm")
def test_rmsnorm_survives_large_and_small_rows(backend: str, dtype: torch.dtype, magnitude: float) -> None:
    x = (draw(3, 4, 48).clamp(-2, 2) * magnitude).to(dtype)  # squares of 30000 do not fit float16
    weight = draw(4, 48, dtype=dtype)
    check(kernels.rmsnorm(x, weight, 1e-6), rms_norm(x.double(), (48,), weight.double(), 1e-6), dtype)


@on_backends("rmsnorm")
def test_rmsnorm_of_zeros_is_zero(backend: str) -> None:
    assert torch.equal(kernels.rmsnorm(torch.zeros(2, 8), torch.ones(8)), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_backends("rmsnorm")
def test_rmsnorm_rounds_like_transformers(backend: str, dtype: torch.dtype) -> None:
    if backend != "reference":
        pytest.skip("only the specification promises the last bit")
    x, weight = draw(5, 32, 96, dtype=dtype), draw(6, 96, dtype=dtype)
    theirs = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight)
    assert torch.equal(kernels.rmsnorm(x, weight, 1e-5), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends("rmsnorm")
def test_rmsnorm_of_strided_tensors(backend: str, dtype: torch.dtype) -> None:
    x, weight = draw(7, 6, 40, dtype=dtype), draw(8, 40, dtype=dtype)
    truth = rms_norm(x.double(), (40,), weight.double(), 1e-6)
    check(kernels.rmsnorm(strided(x), strided(weight)), truth, dtype)
    check(kernels.rmsnorm(x.T.contiguous().T, weight), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_backends("add_rmsnorm")
def test_add_rmsnorm_gives_norm_and_sum(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = draw(9, *shape, dtype=dtype), draw(10, *shape, dtype=dtype), draw(11, shape[-1], dtype=dtype)
    kept = x.clone(), residual.clone()
    normed, total = kernels.add_rmsnorm(x, residual, weight, 1e-5)
    assert total.dtype == dtype
    check_sum(total, x.double() + residual.double(), dtype)
    check(normed, rms_norm(total.double(), (shape[-1],), weight.double(), 1e-5), dtype)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@on_backends("add_rmsnorm")
def test_add_rmsnorm_of_strided_tensors(backend: str) -> None:
    x, residual, weight = draw(12, 6, 40), draw(13, 6, 40), draw(14, 40)
    normed, total = kernels.add_rmsnorm(strided(x), residual.T.contiguous().T, strided(weight))
    assert torch.equal(total, x + residual)
    check(normed, rms_norm(x + residual, (40,), weight, 1e-6), torch.float64)
