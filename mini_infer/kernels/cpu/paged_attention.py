"""Decode attention over the paged cache, read in place.

    out[h] = Σ_j softmax_j(scale * q[h] · k_j) v_j

A task is one sequence, or some of its KV heads when there are few sequences. It goes through the blocks twice:

    1  scores    for each block and KV head:  q [group, D] x keys [D, block]       -> scores [group, block], kept
       softmax   of the kept scores, in place
    2  result    for each block and KV head:  weights [group, block] x values [block, D]  added to [group, D]

In each pass the heads' parts of a block follow one another in memory, so it is read in runs of heads * D * block_size
numbers. The processor guesses what is read next only along such a run, and knows nothing of block tables. We do: while
one head's part of a block is computed, the one after the next is already fetched.

Keeping the scores (4 bytes per token and head, beside the 4 * D bytes of its key and value) costs little, and leaves
both passes to be `tile`s of few rows, so that loading, not arithmetic, is their limit. A long context is cut into
chunks, so that scores take no more memory than `CHUNK` says: after each, the result is the attention over the tokens so
far, and with the next one it becomes a mean of the two, as in an online softmax.

Of codes of 8 bits, a token's scores are multiplied by its key's scale and its weights by its value's: one number each,
and not one for every feature.

Where query heads share keys, `prefill_attention`'s tiles of bfloat16 pairs are candidates beside this, AMX's among
them: their rows are those heads, and what is copied once is multiplied by all. `choice` measures which is faster.

Bytes: every key and value once; floor: bytes / memory bandwidth.
"""

import functools
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
from mini_infer.kernels.cpu.prefill_attention import PAIRED
from mini_infer.kernels.cpu.softmax import largest_score, weigh
from mini_infer.kernels.cpu.tile import LANES, ROWS, VECTORS, tile, widest
from mini_infer.kernels.reference import attention as reference

BLOCKS = "blocks"
"""The candidate of this file."""

CHUNK = 4096
"""Tokens whose scores are kept at a time."""

AHEAD = 2
"""How many pieces before its turn a piece, one head's part of a block, is fetched from memory."""

TRIAL_BYTES = 64 << 20
"""Keys and values of the sequences with which candidates are timed, at most 64 of them: more than caches hold."""


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
    num_seqs = min(max(TRIAL_BYTES // (4 * prefill_attention.TRIAL * num_kv_heads * head_dim), 1), 64)
    key = f"paged_attention {num_heads} heads over {num_kv_heads} of {head_dim}"
    found = choice.times(key, names, [num_seqs])
    if found is None:
        shape = num_seqs, 1, dtype, num_heads, num_kv_heads, head_dim, block_size
        with ThreadPoolExecutor(1) as aside:  # this thread may be making a recording, which must not see the trial
            found = aside.submit(_measure, key, names, shape).result()
    return choice.fastest(found)[num_seqs]


def _measure(key: str, names: list[str], shape: tuple[int, int, torch.dtype, int, int, int, int]) -> choice.Times:
    arguments = prefill_attention.trial(*shape)
    return choice.measure(key, {name: functools.partial(_run, name, arguments) for name in names}, [shape[0]])


def candidates(dtype: torch.dtype, head_dim: int) -> list[str]:
    """The ways to decode on this processor; the first is taken unless another is measured to be faster."""
    return [BLOCKS, *(name for name in prefill_attention.candidates(dtype, head_dim) if name in PAIRED)]


def _run(kind: str, arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], _: int) -> Tensor:
    if kind == BLOCKS:
        return _by_blocks(*arguments, 1.0, None, None)
    return prefill_attention.attend(kind, *arguments, None, 1.0, None, 1)


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
    scores = torch.empty(num_threads * num_heads * room, dtype=torch.float32)
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
        float_bits(scale),
        sliding_window or 0,
        0 if kv_scales is None else kv_scales.data_ptr(),
        work=num_seqs * num_kv_heads * max_blocks * block_size * head_dim,
    )
    return out


@numba.njit
def _piece(block_tables, table, number, heads, num_kv_heads, first_head):
    """Which of the cache's pieces, ``block * num_kv_heads + head``, is read as the ``number``th from ``table`` on."""
    return np.int64(block_tables[table + number // heads]) * num_kv_heads + first_head + number % heads


@numba.njit
def _scale(
    scores, row, kv_scales, block_tables, table, num_kv_heads, head, which, block_size, begin, end
):  # fmt: skip
    """Multiply the scores of the tokens from ``begin`` to ``end`` by the scales of their keys (0) or values (1)."""
    for block in range(begin // block_size, (end + block_size - 1) // block_size):
        piece = np.int64(block_tables[table + block]) * num_kv_heads + head
        first = block * block_size
        scales = (piece * 2 + which) * block_size - first
        for token in range(max(begin, first), min(end, first + block_size)):
            scores[row + token] *= load(kv_scales, scales + token)


@functools.cache
def _kernel(
    element: type, cache_element: type, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> Kernel:
    kind = "int8" if cache_element is np.int8 else "fma" if cache_element is np.float32 else "widen"
    scaled = kind == "int8"
    size = np.dtype(cache_element).itemsize
    group = num_heads // num_kv_heads
    rows = max(divisor for divisor in range(1, ROWS + 3) if group % divisor == 0)  # query heads of a tile
    most = VECTORS if rows <= ROWS else VECTORS // 2
    key_vectors, value_vectors = widest(block_size, most), widest(head_dim, most)
    chunk, columns = key_vectors * LANES, value_vectors * LANES  # tokens, and features, that a tile covers
    head_bytes = head_dim * block_size * size  # of one KV head in one block
    width = num_heads * head_dim

    @kernel
    def paged_attention(args):
        query, out = pointer(args[FIRST], element), pointer(args[FIRST + 5], element)
        key_cache, value_cache = args[FIRST + 1], args[FIRST + 2]
        block_tables, context_lens = pointer(args[FIRST + 3], np.int32), pointer(args[FIRST + 4], np.int32)
        max_blocks, chunk_blocks, num_parts = args[FIRST + 7], args[FIRST + 8], args[FIRST + 9]
        scale, window = as_float(args[FIRST + 10]), args[FIRST + 11]
        kv_scales = pointer(args[FIRST + 12], np.uint16)  # [piece, key and value, block]
        room = chunk_blocks * block_size
        scores_at = args[FIRST + 6] + thread_number(args) * num_heads * room * 4
        query_at, sums_at = buffer(width), buffer(width)
        scores = pointer(scores_at, np.float32)
        wide_query, sums = pointer(query_at, np.float32), pointer(sums_at, np.float32)
        tops, totals = pointer(buffer(num_heads), np.float32), pointer(buffer(num_heads), np.float32)

        for task in tasks(args):
            sequence, part = task // num_parts, task % num_parts
            first_head = num_kv_heads * part // num_parts
            last_head = num_kv_heads * (part + 1) // num_parts
            heads = last_head - first_head
            end = np.int64(context_lens[sequence])
            begin = max(0, end - window) if window > 0 else 0
            first_block, last_block = begin // block_size, (end + block_size - 1) // block_size
            for i in range(first_head * group * head_dim, last_head * group * head_dim):
                wide_query[i] = load(query, sequence * num_heads * head_dim + i)
                sums[i] = np.float32(0)

            for chunk_block in range(first_block, last_block, chunk_blocks):
                table = sequence * max_blocks + chunk_block
                last_piece = (min(last_block, chunk_block + chunk_blocks) - chunk_block) * heads - 1
                start = chunk_block * block_size  # tokens are counted from here
                chunk_begin, chunk_end = max(begin - start, 0), min(end - start, room)

                for number in range(last_piece + 1):
                    place = _piece(block_tables, table, number, heads, num_kv_heads, first_head)
                    later = _piece(
                        block_tables, table, min(number + AHEAD, last_piece), heads, num_kv_heads, first_head
                    )
                    keys, keys_ahead = key_cache + place * head_bytes, key_cache + later * head_bytes
                    first_row = (first_head + number % heads) * group
                    first_token = number // heads * block_size
                    for row in range(first_row, first_row + group, rows):
                        for token in range(0, block_size, chunk):
                            tile(
                                kind, rows, key_vectors, 0, 1,
                                query_at + row * head_dim * 4, head_dim * 4,
                                keys + token * size, block_size * size, head_dim,
                                scores_at + (row * room + first_token + token) * 4, room * 4,
                                keys_ahead + token * size, block_size * size,
                            )  # fmt: skip

                for row in range(first_head * group, last_head * group):
                    low, high = row * room + chunk_begin, row * room + chunk_end
                    if scaled:
                        _scale(
                            scores, row * room, kv_scales, block_tables, table, num_kv_heads, row // group, 0,
                            block_size, chunk_begin, chunk_end,
                        )  # fmt: skip
                    largest = largest_score(scores, low, high, scale)
                    if chunk_block > first_block:
                        largest = tops[row] if tops[row] > largest else largest
                    total = weigh(scores, low, high, scale, largest, scores, low)
                    if chunk_block > first_block:
                        before = totals[row] * exp(tops[row] - largest)
                        total += before
                        for i in range(row * head_dim, (row + 1) * head_dim):
                            sums[i] *= before / total
                    tops[row], totals[row] = largest, total
                    inverse = np.float32(1) / total
                    for i in range(low, high):
                        scores[i] *= inverse
                    if scaled:
                        _scale(
                            scores, row * room, kv_scales, block_tables, table, num_kv_heads, row // group, 1,
                            block_size, chunk_begin, chunk_end,
                        )  # fmt: skip

                for number in range(last_piece + 1):
                    place = _piece(block_tables, table, number, heads, num_kv_heads, first_head)
                    later = _piece(
                        block_tables, table, min(number + AHEAD, last_piece), heads, num_kv_heads, first_head
                    )
                    values, values_ahead = value_cache + place * head_bytes, value_cache + later * head_bytes
                    first_row = (first_head + number % heads) * group
                    first_token = number // heads * block_size
                    token = max(chunk_begin, first_token)
                    count = min(chunk_end, first_token + block_size) - token
                    for row in range(first_row, first_row + group, rows):
                        for column in range(0, head_dim, columns):
                            tile(
                                kind, rows, value_vectors, 1, 2,
                                scores_at + (row * room + token) * 4, room * 4,
                                values + ((token - first_token) * head_dim + column) * size, head_dim * size, count,
                                sums_at + (row * head_dim + column) * 4, head_dim * 4,
                                values_ahead + column * size, head_dim * size,
                            )  # fmt: skip

            for i in range(first_head * group * head_dim, last_head * group * head_dim):
                store(out, sequence * num_heads * head_dim + i, sums[i])

    return paged_attention
