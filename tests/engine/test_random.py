"""The counter-based random numbers: the published SplitMix64, uniform, and unrelated where their counters are near."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from mini_infer.random import uniforms

MASK = 2**64 - 1
LARGEST_BELOW_ONE = 1 - 2.0**-53


def splitmix64(seed: int) -> Iterator[int]:
    """SplitMix64 as its authors publish it, in integers that cannot overflow."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def first(seed: int) -> int:
    return next(splitmix64(seed))


def expected(seed: int, index: int, position: int) -> float:
    return (first(first(first(seed) ^ index) ^ position) >> 11) / 2**53


@pytest.mark.parametrize(
    ("seed", "published"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_the_truth_of_this_file_gives_the_published_numbers(seed: int, published: list[int]) -> None:
    assert list(islice(splitmix64(seed), 4)) == published


def test_random_counters_give_the_numbers_of_the_truth() -> None:
    draw = np.random.default_rng(0)
    seeds = draw.integers(0, 2**64, 500, dtype=np.uint64).tolist()
    indices = draw.integers(0, 64, 500).tolist()
    positions = draw.integers(0, 2**20, 500).tolist()
    counters = list(zip(seeds, indices, positions, strict=True))
    assert uniforms(seeds, indices, positions).tolist() == [expected(*counter) for counter in counters]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("index", [0, 2**31])
@pytest.mark.parametrize("position", [0, 1, 2**40])
def test_extreme_counters(seed: int, index: int, position: int) -> None:
    values = uniforms([seed], [index], [position])
    assert values.dtype == np.float64
    assert values.tolist() == [expected(seed, index, position)]


@pytest.mark.parametrize("seed", [-1, -2, -(2**63)])
def test_negative_seeds_count_modulo_two_to_the_64(seed: int) -> None:
    assert uniforms([seed], [0], [3]).tolist() == uniforms([seed % 2**64], [0], [3]).tolist()


def test_no_counters_give_no_numbers() -> None:
    assert uniforms([], [], []).shape == (0,)


def counters_along(axis: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counters that differ in one coordinate only, by one each."""
    run = np.arange(size, dtype=np.uint64)
    still = np.full(size, 7, dtype=np.uint64)
    return (
        run if axis == "seed" else still,
        run if axis == "index" else still,
        run if axis == "position" else still,
    )


@pytest.mark.parametrize("axis", ["seed", "index", "position"])
def test_numbers_are_uniform_along_each_coordinate(axis: str) -> None:
    stats = pytest.importorskip("scipy.stats", reason="the distribution tests need scipy")
    values = uniforms(*counters_along(axis, 100_000))
    assert values.min() >= 0 and values.max() <= LARGEST_BELOW_ONE
    assert len(np.unique(values)) == len(values)
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    # The low bits of a number must be as good as the high ones: a token deep in the tail depends on them.
    assert stats.kstest(values * 2**20 % 1, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("axis", ["seed", "index", "position"])
@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
def test_neighbours_are_not_correlated(axis: str, lag: int) -> None:
    values = uniforms(*counters_along(axis, 100_000))
    correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(values) - lag)  # four standard deviations of independent numbers


@pytest.mark.parametrize(
    ("one", "other"),
    [("seed", "index"), ("seed", "position"), ("index", "position")],
)
def test_exchanging_two_coordinates_gives_other_numbers(one: str, other: str) -> None:
    a, b = uniforms(*counters_along(one, 10_000)), uniforms(*counters_along(other, 10_000))
    keep = np.arange(10_000) != 7  # where all three coordinates are 7 the counters are the same
    assert not np.intersect1d(a[keep], b[keep]).size
    assert abs(np.corrcoef(a[keep], b[keep])[0, 1]) < 0.04


def test_pairs_of_neighbouring_tokens_fill_the_square_evenly() -> None:
    """What one seed draws at two positions in a row, over many seeds: no cell of a 16 x 16 grid is favoured."""
    stats = pytest.importorskip("scipy.stats", reason="the distribution tests need scipy")
    seeds = np.arange(100_000, dtype=np.uint64)
    zeros = np.zeros_like(seeds)
    pair = [(uniforms(seeds, zeros, zeros + np.uint64(position)) * 16).astype(int) for position in (5, 6)]
    cells = np.bincount(pair[0] * 16 + pair[1], minlength=256)
    assert stats.chisquare(cells).pvalue > 1e-4
