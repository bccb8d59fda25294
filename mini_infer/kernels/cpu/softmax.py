"""Softmax of one query's scores, for use inside the attention kernels."""

import numba
import numpy as np

from mini_infer.kernels.cpu.jit import FAST_MATH, exp, load, store

LEAST = 2.0**-126
"""Stands for a scale of 0, by which no score could be multiplied so that it gets no weight."""


# Comparing many numbers at once needs leave to ignore NaN ("nnan"); `weigh` does not, and makes all weights NaN of one.
@numba.njit(fastmath=FAST_MATH | {"nnan"})
def largest_score(scores, begin, end, scale):
    """The largest of ``scale * scores[begin:end]``."""
    largest = np.float32(-np.inf)
    for i in range(begin, end):
        score = load(scores, i) * scale
        largest = score if score > largest else largest
    return largest


@numba.njit(fastmath=FAST_MATH)
def weigh(scores, begin, end, scale, largest, weights, to):
    """Write e^(scale * score - largest) of ``scores[begin:end]`` to ``weights`` from ``to`` on; their sum."""
    total = np.float32(0)
    for i in range(begin, end):
        weight = exp(scores[i] * scale - largest)
        store(weights, to + i - begin, weight)
        total += weight
    return total
