"""Decode attention over the paged cache, read in place.

    out[h] = Σ_j softmax_j(scale * q[h] · k_j) v_j

A task is one sequence, or some of its KV heads when there are few sequences. It goes through the blocks twice:

    1  scores    for each block and KV head:  q [group, D] x keys [D, block]       -> scores [group, block], kept
       softmax   of the kept scores, in place
    2  result    for each block and KV head:  weights [group, block] x values [block, D]  added to [group, D]

In each pass the heads' parts of a block follow one another in memory, so it is read in runs of heads * D * block_size
numbers. The processor guesses what is read next only along such a run, and knows nothing of block tables. We do: while
a block is computed, the next one is already fetched, and at the end of the first pass the first values are.

Where the processor multiplies pairs of bfloat16, two features of the keys, or two tokens' values, are woven into pairs
on their way into registers, and the weights are rounded to bfloat16; elsewhere numbers are widened, two at a time.

Keeping scores and weights (8 bytes per token and head, beside the 4 * D bytes of its key and value) costs little, and
leaves both passes to be `tile`s of few rows, so that loading, not arithmetic, is their limit. A long context is cut
into chunks, so that scores take no more memory than `CHUNK` says; with each the result so far is scaled to the highest
score yet, as in an online softmax.

Of codes of 8 bits, a token's scores are multiplied by its key's scale and its weights by its value's: one number each,
and not one for every feature.

Where query heads share keys, `prefill_attention`'s tiles of AMX and BFMMLA are candidates beside this: their rows are
those heads, and what is copied once is multiplied by all. `choice` measures which is faster.

Bytes: every key and value once; floor: bytes / memory bandwidth.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu import choice, prefill_attention
from mini_infer.kernels.cpu.jit import (
    CACHE_ELEMENTS,
    ELEMENTS,
    FIRST,
    Kernel,
    as_float,
    buffer,
    exp,
    float_bits,
    kernel,
    load,
    pointer,
    register_fast,
    store,
    tasks,
    thread_number,
)
from mini_infer.kernels.cpu.kv_cache import has_fast_layout
from mini_infer.kernels.cpu.softmax import LEAST, largest_score, weigh
from mini_infer.kernels.cpu.tile import LANES, LINE, PAIRS, ROWS, tile, widest
from mini_infer.kernels.reference import attention as reference

BLOCKS = "blocks"
"""The candidate of this file."""

COPYING = ("amx", "bfmmla")
"""Those of `prefill_attention` that may repay the copying."""

CHUNK = 4096
"""Tokens whose scores are kept at a time."""

TRIAL_SEQUENCES, TRIAL_BYTES = 8, 64 << 20
"""Sequences of a layer with which candidates are timed, and keys and values of all these layers: more than caches
hold."""


@register_fast("paged_attention", reference.paged_attention)
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    known = key_cache.dtype in CACHE_ELEMENTS and has_fast_layout(key_cache, value_cache)
    if not known or not widest(block_size) or not widest(head_dim):
        return reference.paged_attention(
            query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window, kv_scales
        )
    arguments = query, key_cache, value_cache, block_tables, context_lens
    kind = _kind(query.dtype, num_heads, num_kv_heads, head_dim, block_size) if kv_scales is None else BLOCKS
    if kind != BLOCKS:
        return prefill_attention.attend(kind, *arguments, None, scale, sliding_window, 1)
    return _by_blocks(*arguments, scale, sliding_window, kv_scales)


@functools.cache
def _kind(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> str:
    """How such heads decode on this processor: as this file has it, or by a kind of `prefill_attention`."""
    names = candidates(dtype, head_dim)
    if num_heads == num_kv_heads or len(names) == 1:
        return BLOCKS
    key = f"paged_attention {num_heads} heads over {num_kv_heads} of {head_dim}"
    found = choice.times(key, names, [TRIAL_SEQUENCES])
    if found is None:
        shape = TRIAL_SEQUENCES, 1, dtype, num_heads, num_kv_heads, head_dim, block_size
        with ThreadPoolExecutor(1) as aside:  # this thread may be making a recording, which must not see the trial
            found = aside.submit(_measure, key, names, shape).result()
    return choice.fastest(found)[TRIAL_SEQUENCES]


def _measure(key: str, names: list[str], shape: tuple[int, int, torch.dtype, int, int, int, int]) -> choice.Times:
    layers = [prefill_attention.trial(*shape)]
    layers += [prefill_attention.trial(*shape) for _ in range(TRIAL_BYTES // (2 * layers[0][1].nbytes))]
    return choice.measure(key, {name: functools.partial(_run, name, layers) for name in names}, [shape[0]])


def candidates(dtype: torch.dtype, head_dim: int) -> list[str]:
    """The ways to decode on this processor; the first is taken unless another is measured to be faster."""
    return [BLOCKS, *(name for name in prefill_attention.candidates(dtype, head_dim) if name in COPYING)]


def _run(kind: str, layers: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]], _: int) -> None:
    for arguments in layers:
        if kind == BLOCKS:
            _by_blocks(*arguments, 1.0, None, None)
        else:
            prefill_attention.attend(kind, *arguments, None, 1.0, None, 1)


def _by_blocks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: Tensor | None,
) -> Tensor:
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    query, block_tables = query.contiguous(), block_tables.to(torch.int32).contiguous()
    context_lens = context_lens.to(torch.int32).contiguous()
    out = torch.empty_like(query)
    max_blocks = block_tables.shape[1]
    chunk_blocks = min(max_blocks, max(1, CHUNK // block_size))
    room = chunk_blocks * block_size
    num_threads = torch.get_num_threads()
    # Sequences differ in length, so every thread should get a few tasks.
    num_parts = min(num_kv_heads, -(-2 * num_threads // max(num_seqs, 1)))
    scores = torch.empty(2 * num_threads * num_heads * room, dtype=torch.float32)  # and weights
    elements = ELEMENTS[query.dtype], CACHE_ELEMENTS[key_cache.dtype]
    _kernel(*elements, num_heads, num_kv_heads, head_dim, block_size)(
        num_seqs * num_parts,
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        out.data_ptr(),
        scores.data_ptr(),
        max_blocks,
        chunk_blocks,
        num_parts,
        float_bits(scale or LEAST),
        sliding_window or 0,
        0 if kv_scales is None else kv_scales.data_ptr(),
        work=num_seqs * num_kv_heads * max_blocks * block_size * head_dim,
    )
    return out


@numba.njit
def _scale(
    numbers, row, kv_scales, block_tables, table, num_kv_heads, head, which, block_size, begin, end
):  # fmt: skip
    """Multiply scores of the tokens from ``begin`` to ``end`` by their keys' scales (0), or weights by values' (1)."""
    for block in range(begin // block_size, (end + block_size - 1) // block_size):
        piece = np.int64(block_tables[table + block]) * num_kv_heads + head
        first = block * block_size
        scales = (piece * 2 + which) * block_size - first
        for token in range(max(begin, first), min(end, first + block_size)):
            numbers[row + token] *= load(kv_scales, scales + token)


@functools.cache
def _kernel(
    element: type, cache_element: type, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> Kernel:
    kinds: dict[type, str] = {np.int8: "int8", np.float32: "fma", np.uint16: "weave" if PAIRS else "twice"}
    kind = kinds[cache_element]
    scaled, woven = kind == "int8", kind == "weave"
    step = 2 if kind in ("weave", "twice") else 1  # how many k a tile takes as one
    x_size = 2 if woven else 4  # bytes of a query's number or a weight
    size = np.dtype(cache_element).itemsize
    group = num_heads // num_kv_heads
    rows = max(divisor for divisor in range(1, ROWS + 3) if group % divisor == 0)  # query heads of a tile
    key_vectors, value_vectors = widest(block_size, rows), widest(head_dim, rows)
    chunk, columns = key_vectors * LANES, value_vectors * LANES  # tokens, and features, that a tile covers
    key_lines, value_lines = -(-step * chunk * size // LINE), -(-step * columns * size // LINE)
    head_bytes = head_dim * block_size * size  # of one KV head in one block
    width = num_heads * head_dim
    weight_element = np.uint16 if woven else np.float32

    @kernel
    def paged_attention(args):
        query, out = pointer(args[FIRST], element), pointer(args[FIRST + 5], element)
        key_cache, value_cache = args[FIRST + 1], args[FIRST + 2]
        block_tables, context_lens = pointer(args[FIRST + 3], np.int32), pointer(args[FIRST + 4], np.int32)
        max_blocks, chunk_blocks, num_parts = args[FIRST + 7], args[FIRST + 8], args[FIRST + 9]
        scale, window = as_float(args[FIRST + 10]), args[FIRST + 11]
        hidden = -np.float32(np.inf) / scale  # a score that gets no weight
        kv_scales = pointer(args[FIRST + 12], np.uint16)  # [piece, key and value, block]
        room = chunk_blocks * block_size
        scores_at = args[FIRST + 6] + thread_number(args) * num_heads * room * 8
        weights_at = scores_at + num_heads * room * 4  # not in place: LLVM would compute one weight at a time
        query_at, sums_at = buffer(width), buffer(width)
        scores, weights = pointer(scores_at, np.float32), pointer(weights_at, weight_element)
        wide_query, sums = pointer(query_at, np.float32), pointer(sums_at, np.float32)
        tops, totals = pointer(buffer(num_heads), np.float32), pointer(buffer(num_heads), np.float32)

        for task in tasks(args):
            sequence, part = task // num_parts, task % num_parts
            first_head = num_kv_heads * part // num_parts
            last_head = num_kv_heads * (part + 1) // num_parts
            ahead = 1 if last_head - first_head > 1 else 2  # blocks, all of whose heads follow one another
            end = np.int64(context_lens[sequence])
            begin = max(0, end - window) if window > 0 else 0
            first_block, last_block = begin // block_size, (end + block_size - 1) // block_size
            x = args[FIRST] + sequence * width * x_size if woven else query_at
            for i in range(first_head * group * head_dim, last_head * group * head_dim):
                if not woven:
                    wide_query[i] = load(query, sequence * width + i)
                sums[i] = np.float32(0)
            for row in range(first_head * group, last_head * group):
                tops[row], totals[row] = -np.float32(np.inf), np.float32(0)

            for chunk_block in range(first_block, last_block, chunk_blocks):
                table = sequence * max_blocks + chunk_block
                num_blocks = min(last_block - chunk_block, chunk_blocks)
                start = chunk_block * block_size  # tokens are counted from here
                chunk_begin, chunk_end = max(begin - start, 0), min(end - start, room)

                for block in range(num_blocks):
                    piece = np.int64(block_tables[table + block]) * num_kv_heads
                    later, cache_ahead = block + ahead, key_cache
                    if later >= num_blocks:
                        later, cache_ahead = min(later - num_blocks, num_blocks - 1), value_cache
                    later_piece = np.int64(block_tables[table + later]) * num_kv_heads
                    for head in range(first_head, last_head):
                        keys = key_cache + (piece + head) * head_bytes
                        keys_ahead = cache_ahead + (later_piece + head) * head_bytes
                        for row in range(head * group, head * group + group, rows):
                            for token in range(0, block_size, chunk):
                                tile(
                                    kind, rows, key_vectors, 0, key_lines,
                                    x + row * head_dim * x_size, head_dim * x_size,
                                    keys + token * size, block_size * size, head_dim // step,
                                    scores_at + (row * room + block * block_size + token) * 4, room * 4,
                                    keys_ahead + token * size, step * block_size * size,
                                )  # fmt: skip

                # Whole vectors are weighed; what lies outside the context gets no weight.
                low, high = chunk_begin // LANES * LANES, (chunk_end + LANES - 1) // LANES * LANES
                for row in range(first_head * group, last_head * group):
                    at = row * room
                    if scaled:
                        _scale(
                            scores, at, kv_scales, block_tables, table, num_kv_heads, row // group, 0, block_size,
                            chunk_begin, chunk_end,
                        )  # fmt: skip
                    for i in range(at + low, at + chunk_begin):
                        scores[i] = hidden
                    for i in range(at + chunk_end, at + high):
                        scores[i] = hidden
                    largest = max(tops[row], largest_score(scores, at + low, at + high, scale))
                    total = weigh(scores, at + low, at + high, scale, largest, weights, at + low)
                    before = exp(tops[row] - largest)  # what weights so far become
                    tops[row], totals[row] = largest, totals[row] * before + total
                    for i in range(row * head_dim, (row + 1) * head_dim):
                        sums[i] *= before
                    if scaled:
                        _scale(
                            weights, at, kv_scales, block_tables, table, num_kv_heads, row // group, 1, block_size,
                            chunk_begin, chunk_end,
                        )  # fmt: skip

                for block in range(num_blocks):
                    piece = np.int64(block_tables[table + block]) * num_kv_heads
                    later_piece = np.int64(block_tables[table + min(block + ahead, num_blocks - 1)]) * num_kv_heads
                    first_token = block * block_size
                    token = max(chunk_begin // step * step, first_token)
                    count = min(chunk_end, first_token + block_size) - token
                    for head in range(first_head, last_head):
                        values = value_cache + (piece + head) * head_bytes + (token - first_token) * head_dim * size
                        values_ahead = value_cache + (later_piece + head) * head_bytes
                        for row in range(head * group, head * group + group, rows):
                            for column in range(0, head_dim, columns):
                                weights_from = weights_at + (row * room + token) * x_size
                                sums_to = sums_at + (row * head_dim + column) * 4
                                if count >= step:
                                    tile(
                                        kind, rows, value_vectors, 1, value_lines, weights_from, room * x_size,
                                        values + column * size, head_dim * size, count // step,
                                        sums_to, head_dim * 4,
                                        values_ahead + column * block_size * size, value_lines * LINE,
                                    )  # fmt: skip
                                if count % step:  # no token follows: the last one is paired with itself, by weight 0
                                    last = count - 1
                                    tile(
                                        kind, rows, value_vectors, 1, 0, weights_from + last * x_size, room * x_size,
                                        values + (last * head_dim + column) * size, 0, 1,
                                        sums_to, head_dim * 4, 0, 0,
                                    )  # fmt: skip

            for row in range(first_head * group, last_head * group):
                inverse = np.float32(1) / totals[row] if end > 0 else np.float32(0)
                for i in range(row * head_dim, (row + 1) * head_dim):
                    store(out, sequence * width + i, sums[i] * inverse)

    return paged_attention
