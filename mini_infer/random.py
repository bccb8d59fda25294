"""Counter-based randomness: a sampled token depends on who it is, not on when or beside whom it is drawn."""

import numpy as np
import numpy.typing as npt

_UInt64 = npt.NDArray[np.uint64]


def uniforms(seeds: npt.ArrayLike, indices: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, index among ``n``, position).

    Three rounds of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014), one for
    each coordinate. No state is kept, so a token comes out the same alone, in any batch, and after a preemption.

    Args:
        seeds: uint64, or any integers, which count modulo 2^64.
        indices, positions: integers from 0.

    Returns:
        float64 ``[S]``, multiples of 2^-53.
    """
    numbers = np.asarray(seeds)
    if numbers.dtype != np.uint64:
        numbers = np.asarray(np.asarray(seeds, dtype=object) % 2**64, dtype=np.uint64)
    state = _mix(numbers)
    state = _mix(state ^ np.asarray(indices, dtype=np.uint64))
    state = _mix(state ^ np.asarray(positions, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derived_seed(seed: int, number: int) -> int:
    """The seed of the ``number``-th request among those that bring none, from the engine's ``seed``; below 2^64."""
    return int(_mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(number))[0])


def _mix(state: _UInt64) -> _UInt64:
    """SplitMix64: add the golden ratio, then scramble. Overflow wraps, as it should."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))
