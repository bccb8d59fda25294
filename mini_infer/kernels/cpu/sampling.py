"""The likeliest token and its log probability; and tokens drawn at random.

    i = argmax_j z_j        logprob = z_i - log Σ_j exp(z_j)

A task is one row, a few hundred kilobytes that stay in the core's cache: once for the largest, once for its place, once
for the sum. Bytes: the logits once, in their own dtype; PyTorch's composition writes them out as float32 first, and
goes to memory for each of its steps. Floor: bytes / memory bandwidth.
"""

import functools

import numba
import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu.jit import (
    ELEMENTS,
    FAST_MATH,
    FIRST,
    Kernel,
    exp,
    float_of,
    kernel,
    load,
    pointer,
    register_fast,
    store,
    tasks,
    thread_number,
)
from mini_infer.kernels.cpu.softmax import largest_score
from mini_infer.kernels.host import Floats, Ints
from mini_infer.kernels.reference import sampling as reference

_BLOCK = 64
"""Neighbours whose largest is looked at first: most blocks hold nothing that could be among the likeliest."""

_MOST = np.float32(np.finfo(np.float32).max)


@register_fast("argmax_logprob", reference.argmax_logprob)
def argmax_logprob(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    logprobs = torch.empty(num_rows, dtype=torch.float32)
    _kernel(ELEMENTS[logits.dtype])(
        num_rows, logits.data_ptr(), token_ids.data_ptr(), logprobs.data_ptr(), vocab_size, work=logits.numel()
    )
    return token_ids, logprobs


@functools.cache
def _kernel(element: type) -> Kernel:
    @kernel
    def argmax_logprob(args):
        logits, vocab_size = pointer(args[FIRST], element), args[FIRST + 3]
        token_ids, logprobs = pointer(args[FIRST + 1], np.int64), pointer(args[FIRST + 2], np.float32)
        for row in tasks(args):
            begin, end = row * vocab_size, (row + 1) * vocab_size
            largest = largest_score(logits, begin, end, np.float32(1))
            place = begin
            while place < end - 1 and load(logits, place) != largest:
                place += 1
            total = np.float32(0)
            for i in range(begin, end):
                total += exp(load(logits, i) - largest)
            token_ids[row] = place - begin
            logprobs[row] = -np.log(total)

    return argmax_logprob


@register_fast("draw_tokens", reference.draw_tokens)
def draw_tokens(
    logits: Tensor, temperature: Floats, top_k: Ints, top_p: Floats, min_p: Floats, uniform: Floats
) -> Tensor:
    """One pass over a row finds the largest of each few neighbours, so that most of these need no second look. A heap
    holds the k largest; what ``top_p`` keeps is found by halves, among those that can matter."""
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    limits = np.finfo(np.float32)
    columns = np.stack(
        [np.clip(temperature, limits.tiny, limits.max), np.clip(top_p, limits.tiny, None), min_p, uniform]
    )
    few = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size).astype(np.int64)
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    scratch = torch.empty((torch.get_num_threads(), 3 * vocab_size + vocab_size // _BLOCK + 1), dtype=torch.float32)
    _draw_kernel(ELEMENTS[logits.dtype])(
        num_rows,
        logits.data_ptr(),
        columns.ctypes.data,
        few.ctypes.data,
        token_ids.data_ptr(),
        scratch.data_ptr(),
        vocab_size,
        num_rows,
        work=4 * logits.numel(),
    )
    return token_ids


@numba.njit(fastmath=FAST_MATH)
def _scaled(logits, place, largest, temperature):
    """A logit, the row's largest being moved to 0, so that no temperature makes inf - inf of it."""
    z = load(logits, place)
    return ((z if z < _MOST else _MOST) - largest) / temperature


@numba.njit
def _look_at_blocks(logits, begin, count, maxima):
    """Write the largest of each ``_BLOCK`` neighbours of a row; the largest of all."""
    largest = -np.float32(np.inf)
    for first in range(0, count, _BLOCK):
        highest = largest_score(logits, begin + first, begin + min(first + _BLOCK, count), np.float32(1))
        store(maxima, first // _BLOCK, highest)
        largest = max(largest, highest)
    return largest


@numba.njit
def _kth_largest(logits, begin, count, k, maxima, heap):
    """The k-th largest of a row; in ``heap`` is room for k, each not above its two children."""
    for i in range(k):
        heap[i] = load(logits, begin + i)
    for i in range(k // 2 - 1, -1, -1):
        _sink(heap, i, k)
    for first in range(k // _BLOCK * _BLOCK, count, _BLOCK):
        if maxima[first // _BLOCK] > heap[0]:
            for i in range(max(first, k), min(first + _BLOCK, count)):
                z = load(logits, begin + i)
                if z > heap[0]:
                    heap[0] = z
                    _sink(heap, np.int64(0), k)
    return heap[0]


@numba.njit
def _sink(heap, place, size):
    """Put the number at a place where it belongs among those below it."""
    number = heap[place]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= number:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = number


@numba.njit(fastmath=FAST_MATH)
def _weigh_all(logits, begin, count, largest, temperature, weights):
    """Write e^scaled for a whole row; their sum."""
    total = np.float64(0)
    for first in range(0, count, 1024):
        part = np.float32(0)
        for i in range(first, min(first + 1024, count)):
            weight = exp(_scaled(logits, begin + i, largest, temperature))
            store(weights, i, weight)
            part += weight
        total += np.float64(part)
    return total


@numba.njit(fastmath=FAST_MATH)
def _mass(weights, count, least):
    """The sum of those weights that are at least ``least``."""
    total = np.float64(0)
    for i in range(count):
        total += np.float64(weights[i] if weights[i] >= least else np.float32(0))
    return total


@numba.njit
def _keep_top_p(weights, ids, count, enough):
    """Keep the likeliest that together reach ``enough``, of equals the first, or all if these do not; how many.

    Nothing is sorted: the least weight that is kept is found bit by bit, each time by a sum. None is above 1.
    """
    bits = 0
    for place in range(29, -1, -1):
        if np.float32(_mass(weights, count, float_of(bits | 1 << place))) >= enough:
            bits |= 1 << place
    least, before = float_of(bits), _mass(weights, count, float_of(bits + 1))
    kept = 0
    for i in range(count):
        stays = weights[i] > least
        if weights[i] == least and np.float32(before) < enough:
            stays, before = True, before + np.float64(least)
        if stays:
            weights[kept], ids[kept] = weights[i], ids[i]
            kept += 1
    return kept


@numba.njit
def _invert(weights, count, least, uniform):
    """Which of the weights that are at least ``least`` the random number falls on; the last if they are no numbers."""
    total, last = np.float64(0), 0
    for i in range(count):
        if weights[i] >= least and weights[i] > 0:
            total += np.float64(weights[i])
            last = i
    target, cumulative = uniform * total, np.float64(0)
    for i in range(last):
        if weights[i] >= least:
            cumulative += np.float64(weights[i])
            if cumulative > target:
                return i
    return last


@functools.cache
def _draw_kernel(element: type) -> Kernel:
    @kernel
    def draw_tokens(args):
        logits, columns = pointer(args[FIRST], element), pointer(args[FIRST + 1], np.float64)
        few, token_ids = pointer(args[FIRST + 2], np.int64), pointer(args[FIRST + 3], np.int64)
        vocab_size, num_rows = args[FIRST + 5], args[FIRST + 6]
        room = args[FIRST + 4] + thread_number(args) * (3 * vocab_size + vocab_size // _BLOCK + 1) * 4
        weights, ids = pointer(room, np.float32), pointer(room + vocab_size * 4, np.int32)
        others, maxima = pointer(room + vocab_size * 8, np.float32), pointer(room + vocab_size * 12, np.float32)
        for row in tasks(args):
            begin = row * vocab_size
            temperature, top_p = np.float32(columns[row]), np.float32(columns[num_rows + row])
            min_p, uniform = np.float32(columns[2 * num_rows + row]), columns[3 * num_rows + row]
            largest = _look_at_blocks(logits, begin, vocab_size, maxima)
            largest = largest if largest < _MOST else _MOST
            k = few[row]
            if k == vocab_size and top_p >= 1:
                _weigh_all(logits, begin, vocab_size, largest, temperature, weights)
                token_ids[row] = _invert(weights, vocab_size, min_p, uniform)
                continue
            if k < vocab_size:
                place = _kth_largest(logits, begin, vocab_size, k, maxima, others)
                threshold = ((place if place < _MOST else _MOST) - largest) / temperature
                total = np.float64(0)
            else:
                # Tokens below an equal share of what top_p leaves out do not reach that together, and half of such a
                # share leaves room for rounding.
                total = _weigh_all(logits, begin, vocab_size, largest, temperature, others)
                threshold = np.log(np.float32(0.5) * (np.float32(1) - top_p) * np.float32(total / vocab_size))
            count = np.int64(0)  # a constant would have functions compiled for it alone
            for first in range(0, vocab_size, _BLOCK):
                if (min(maxima[first // _BLOCK], _MOST) - largest) / temperature >= threshold:
                    for i in range(first, min(first + _BLOCK, vocab_size)):
                        scaled = _scaled(logits, begin + i, largest, temperature)
                        if scaled >= threshold:
                            weights[count], ids[count] = exp(scaled), i
                            count += 1
            if top_p < 1:
                if k < vocab_size:
                    total = _mass(weights, count, np.float32(0))
                count = _keep_top_p(weights, ids, count, top_p * np.float32(total))
            if count > 0:
                highest = np.float32(0)
                for i in range(count):
                    highest = max(highest, weights[i])
                token_ids[row] = ids[_invert(weights, count, highest * min_p, uniform)]
            else:
                token_ids[row] = vocab_size - 1  # no numbers, and any token will do

    return draw_tokens
