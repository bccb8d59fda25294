"""The CPU's kernel draws the tokens that PyTorch's composition draws, whatever the filters."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from mini_infer.executor.sampler import _Filters, _invert, _wide
from mini_infer.kernels.cpu.sampling import draw_tokens

NUM_ROWS = 60


def draw_some(seed: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Parameters of all kinds beside each other, neutral ones and extreme ones among them."""
    draw = np.random.default_rng(seed)
    return {
        "temperature": draw.choice([1e-40, 0.01, 0.5, 0.8, 1.0, 2.5, 1e30], NUM_ROWS),
        "top_k": draw.choice([-1, 0, 1, 2, 5, 50, vocab_size - 1, vocab_size, 10**9], NUM_ROWS),
        "top_p": draw.choice([0.0, 0.05, 0.5, 0.95, 0.9999, 1.0], NUM_ROWS),
        "min_p": draw.choice([0.0, 0.0, 0.01, 0.3, 1.0], NUM_ROWS),
        "uniform": draw.choice([0.0, 1 - 2.0**-53, *draw.random(8)], NUM_ROWS),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab_size", "spread"), [(1, 1.0), (2, 1.0), (63, 2.0), (515, 0.0), (3000, 4.0), (20000, 0.1)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_are_those_of_the_composition(vocab_size: int, spread: float, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    different = []
    try:
        for seed in range(3):
            parameters = draw_some(seed, vocab_size)
            logits = (torch.randn(NUM_ROWS, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread).to(
                dtype
            )
            tokens = draw_tokens(logits, **parameters)
            columns = {name: column for name, column in parameters.items() if name != "uniform"}
            expected = _invert(_wide(logits), _Filters(parameters["uniform"], columns))
            different += [(seed, row) for row in (tokens != expected).nonzero().flatten().tolist()]
    finally:
        torch.set_num_threads(before)
    # Where a random number falls between two tokens to within a float32's rounding, either is right.
    assert len(different) <= 1, different


def test_rows_that_are_no_distribution_give_some_token() -> None:
    logits = torch.randn(6, 700)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2] = torch.inf
    logits[3, 5] = torch.nan
    logits[4, :-1] = -torch.inf
    for seed in range(20):
        parameters = {name: column[:6] for name, column in draw_some(seed, 700).items()}
        tokens = draw_tokens(logits, **parameters)
        assert ((tokens >= 0) & (tokens < 700)).all()
        assert tokens[4] == 699
