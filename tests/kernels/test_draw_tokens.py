"""Tokens drawn at random: those of the formula, whatever the filters and whoever draws."""

import math

import numpy as np
import pytest
import torch

from mini_infer import kernels
from mini_infer.kernels.reference import sampling as reference

from .truth import draw, on_backends

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


def token_of_the_formula(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> int:
    largest = max(logits)
    weights = [math.exp(max((z - largest) / temperature, -800)) for z in logits]
    if 0 < top_k < len(logits):
        last = sorted(logits)[-top_k]
        weights = [w if z >= last else 0 for w, z in zip(weights, logits, strict=True)]
    if top_p < 1:
        order = sorted(range(len(weights)), key=lambda i: -weights[i])
        enough, before, kept = max(top_p, 1e-30) * math.fsum(weights), 0.0, set()
        for i in order:
            if before < enough:
                kept.add(i)
            before += weights[i]
        weights = [w if i in kept else 0 for i, w in enumerate(weights)]
    least = min_p * max(weights)
    weights = [w if w >= least else 0 for w in weights]
    target, sum_so_far = uniform * math.fsum(weights), 0.0
    for i, w in enumerate(weights):
        sum_so_far += w
        if sum_so_far > target:
            return i
    return max(i for i, w in enumerate(weights) if w > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab_size", "spread"), [(1, 1.0), (2, 1.0), (63, 2.0), (515, 0.0), (3000, 4.0), (6000, 0.1)]
)
@on_backends("draw_tokens")
def test_it_is_the_formula(backend: str, vocab_size: int, spread: float, dtype: torch.dtype) -> None:
    different = []
    for seed in range(2):
        parameters = draw_some(seed, vocab_size)
        parameters["temperature"] = parameters["temperature"].clip(0.01, 1e30)  # float64 has smaller ones than float32
        logits = (draw(seed, NUM_ROWS, vocab_size) * spread).to(dtype)
        tokens = kernels.draw_tokens(logits, **parameters)
        for row, found in enumerate(tokens.tolist()):
            columns = {name: column[row].item() for name, column in parameters.items()}
            if token_of_the_formula(logits[row].double().tolist(), **columns) != found:
                different.append((seed, row, columns))
    # Where a random number, or the border of a filter, falls between two tokens to within a rounding, either is right.
    assert len(different) <= 2, different


@pytest.mark.parametrize("threads", [1, 3])
@on_backends("draw_tokens")
def test_the_number_of_threads_changes_nothing(backend: str, threads: int) -> None:
    logits, parameters = draw(1, NUM_ROWS, 3000, dtype=torch.float32), draw_some(1, 3000)
    expected = kernels.draw_tokens(logits, **parameters)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kernels.draw_tokens(logits, **parameters), expected)
    finally:
        torch.set_num_threads(before)


@on_backends("draw_tokens")
def test_no_rows(backend: str) -> None:
    columns = {name: column[:0] for name, column in draw_some(0, 5).items()}
    assert kernels.draw_tokens(torch.empty(0, 5), **columns).shape == (0,)


@on_backends("draw_tokens")
def test_rows_that_are_no_distribution_give_some_token(backend: str) -> None:
    logits = draw(5, 6, 700, dtype=torch.float32)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2] = torch.inf
    logits[3, 5] = torch.nan
    logits[4, :-1] = -torch.inf
    for seed in range(20):
        parameters = {name: column[:6] for name, column in draw_some(seed, 700).items()}
        tokens = kernels.draw_tokens(logits, **parameters)
        assert ((tokens >= 0) & (tokens < 700)).all()
        assert tokens[4] == 699


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_without_a_question_to_the_device_keeps_the_same_tokens(dtype: torch.dtype) -> None:
    """What a GPU does beside what a CPU does; random logits have no ties."""
    generator = torch.Generator().manual_seed(23)
    for vocab_size in (1, 2, 700, 5000):
        logits = (torch.randn(6, vocab_size, generator=generator, dtype=torch.float64) * 3).to(dtype)
        logits[0, vocab_size // 2 :] = -torch.inf
        logits[0, 0] = 0
        top_p = torch.tensor([0.5, 1e-6, 0.3, 0.9, 0.999, 1.0], dtype=dtype)[:, None]
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        expected = reference._keep_top_p(weights, top_p, reference._ranked(weights, 512))
        torch.testing.assert_close(reference._keep_top_p_unasked(weights, top_p), expected, rtol=0, atol=0)


def test_top_p_without_a_question_keeps_all_of_equal_tokens() -> None:
    weights = torch.tensor([[0.0, 1.0, 1.0, 1.0, -1.0]]).exp()
    kept = reference._keep_top_p_unasked(weights, torch.tensor([[0.5]]))
    assert (kept > 0).tolist() == [[False, True, True, True, False]]
