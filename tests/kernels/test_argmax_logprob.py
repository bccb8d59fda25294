"""The likeliest token and its log probability, against float64."""

import pytest
import torch

from mini_infer import kernels

from .truth import DTYPES, draw, on_backends, strided


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (2, 64), (5, 1000), (2, 40007)], ids=str)
@on_backends("argmax_logprob")
def test_it_is_the_formula(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = (5 * draw(1, *shape)).to(dtype)  # in bfloat16 the largest has equals now and then
    token_ids, logprobs = kernels.argmax_logprob(logits)
    rows = logits.double().tolist()
    assert token_ids.tolist() == [row.index(max(row)) for row in rows] and token_ids.dtype == torch.int64
    truth = logits.double().log_softmax(-1).amax(-1) if shape[0] else torch.empty(0, dtype=torch.float64)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rounding = 2**-53 if dtype == torch.float64 else 2**-24
    bound = (shape[1] + 8 + logits.double().abs().amax() * 2 if shape[0] else 1) * rounding  # of a sum in any order
    assert ((logprobs.double() - truth).abs() <= bound).all()


@on_backends("argmax_logprob")
def test_far_out_and_strided(backend: str) -> None:
    logits = torch.tensor([[-1e30, -1e30, 3.0], [100.0, 0.0, 100.0], [-torch.inf, 5.0, 5.0]])
    token_ids, logprobs = kernels.argmax_logprob(logits)
    assert token_ids.tolist() == [2, 0, 1]
    assert torch.allclose(logprobs, torch.tensor([0.0, -0.693147, -0.693147]))
    x = draw(2, 4, 50, dtype=torch.float32)
    assert torch.equal(kernels.argmax_logprob(strided(x))[0], x.argmax(-1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@on_backends("argmax_logprob")
def test_a_row_that_is_not_finite_says_so(backend: str, bad: float) -> None:
    logits = draw(3, 3, 100, dtype=torch.float32)
    logits[1, 40] = bad
    token_ids, logprobs = kernels.argmax_logprob(logits)
    assert 0 <= token_ids[1] < 100
    assert logprobs.isnan().tolist() == [False, True, False]
