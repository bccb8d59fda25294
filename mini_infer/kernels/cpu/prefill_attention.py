"""Prompt attention: chunks of new tokens over the paged cache; and decode attention by the same tiles.

A task is one KV head of one sequence. Many queries read the same keys and values, so the task first copies them out of
their blocks, into the order in which tiles read them fastest, and then takes six queries of one head at a time, or
sixteen where AMX multiplies:

    scores   [6, context]  = q [6, D] x keys [D, context]          64 tokens per tile
    softmax  of each row, over the tokens that its query sees
    result   [6, D]        = weights [6, context] x values [context, D]     64 features per tile

A long context is cut into chunks of `CHUNK` tokens, so that copies and scores take no more memory than that; then what
each query has so far, its highest score, the sum of its weights and the weighted sum, waits in memory for the next one.

Each query block computes no more tokens than its last query sees, so causality (a span of 1) saves half of the work.

In a decode step a sequence has one new token, and the rows of a tile are its query heads that share a KV head: one of
AMX takes sixteen for the price of one. `paged_attention` measures whether that repays the copying.

FLOPs: 4 * D per query, head and visible token. Floor: FLOPs / the processor's peak; the copy is D / queries of that.
With bfloat16 the weights are rounded to bfloat16 before they multiply the values, except by "widen". Codes of 8 bits
become numbers of the query's dtype as they are copied.
"""

import functools
import math

import numba
import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.cpu import amx, linear
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
from mini_infer.kernels.cpu.kv_cache import allocate_kv_cache
from mini_infer.kernels.cpu.softmax import LEAST, largest_score, weigh
from mini_infer.kernels.cpu.tile import COLUMNS, LANES, MATRICES, PAIRS, ROWS, VECTORS, fetch, interleave, tiles, widest
from mini_infer.kernels.reference import attention as reference

CHUNK = 4096
"""Tokens that are copied and scored at a time; a multiple of `COLUMNS`."""

AHEAD = 2
"""How many times `LANES` tokens before their turn keys and values are fetched from memory."""

PAIRED = ("dot", "amx", "bfmmla")
"""Kinds whose tiles take bfloat16 in pairs."""

TRIAL = 256
"""Tokens with which candidates are timed."""


@register_fast("paged_prefill_attention", reference.paged_prefill_attention)
def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
    sliding_window: int | None,
    span: int,
    kv_scales: Tensor | None = None,
) -> Tensor:
    head_dim = query.shape[2]
    arguments = query, key_cache, value_cache, block_tables, context_lens, query_start
    if not widest(head_dim) or key_cache.dtype not in CACHE_ELEMENTS:
        return reference.paged_prefill_attention(*arguments, scale, sliding_window, span, kv_scales)
    return attend(_kind(query.dtype, head_dim), *arguments, scale, sliding_window, span, kv_scales)


@functools.cache
def _kind(dtype: torch.dtype, head_dim: int) -> str:
    """How heads are multiplied on this processor: like weights, since both are the same tiles, so that no candidate has
    to be compiled only to be found slower."""
    names = candidates(dtype, head_dim)
    if len(names) == 1:
        return names[0]
    products = {"split" if name == "widen" else name: name for name in names}
    return products[linear.fastest(tuple(products), TRIAL)]


def trial(
    num_seqs: int,
    num_queries: int,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, caches, block tables and context lengths of sequences of `TRIAL` tokens, to time candidates with."""
    num_blocks = -(-TRIAL // block_size)
    cpu = torch.device("cpu")
    keys, values = allocate_kv_cache(num_seqs * num_blocks, block_size, num_kv_heads, head_dim, dtype, cpu)
    keys.fill_(1), values.fill_(1)
    query = torch.randn(num_seqs * num_queries, num_heads, head_dim).to(dtype)
    tables = torch.arange(num_seqs * num_blocks, dtype=torch.int32).view(num_seqs, num_blocks)
    return query, keys, values, tables, torch.full((num_seqs,), TRIAL)


def candidates(dtype: torch.dtype, head_dim: int) -> list[str]:
    """The ways to multiply on this processor; the first is taken unless another multiplies weights faster."""
    if dtype is torch.float32:
        return ["fma"]
    names = ["dot", "widen"] if PAIRS else ["widen", "bfmmla"] if MATRICES else ["widen"]
    return [*names, "amx"] if amx.is_there() and PAIRS and head_dim % COLUMNS == 0 else names


def attend(
    kind: str,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor | None,
    scale: float,
    sliding_window: int | None,
    span: int,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Attention by one of the `candidates`; without ``query_start``, of one new token for each sequence."""
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    dtype = query.dtype
    query = query.contiguous() if kind in PAIRED else query.float().contiguous()
    block_tables = block_tables.to(torch.int32).contiguous()
    context_lens = context_lens.to(torch.int32).contiguous()
    query_start = None if query_start is None else query_start.to(torch.int32).contiguous()
    out = (torch.empty if query_start is None else torch.zeros)(query.shape, dtype=dtype)
    num_seqs, max_blocks = block_tables.shape
    room = min(-(-max_blocks * block_size // COLUMNS) * COLUMNS, CHUNK)  # tokens of a thread
    room_bytes = room * (2 * head_dim * dtype.itemsize + _most_rows(kind) * 8)
    scratch = torch.empty(torch.get_num_threads() * room_bytes + 64, dtype=torch.uint8)
    waiting = torch.empty(num_tokens if max_blocks * block_size > room else 0, num_heads, head_dim + 2)
    # Heads of a sequence that one thread takes: of those that decode as many as leave each thread some tasks.
    enough = query_start is None and num_seqs * num_kv_heads >= 8 * torch.get_num_threads()
    together = math.gcd(num_kv_heads, num_seqs * num_kv_heads // (4 * torch.get_num_threads())) if enough else 1
    _kernel(ELEMENTS[dtype], CACHE_ELEMENTS[key_cache.dtype], kind, head_dim)(
        num_seqs * num_kv_heads // together,
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        0 if query_start is None else query_start.data_ptr(),
        out.data_ptr(),
        -(-scratch.data_ptr() // 64) * 64,
        room_bytes,
        room,
        waiting.data_ptr(),
        max_blocks,
        block_size,
        num_heads,
        num_kv_heads,
        float_bits(scale or LEAST),
        sliding_window or 0,
        span,
        *key_cache.stride(),
        *value_cache.stride(),
        0 if kv_scales is None else kv_scales.data_ptr(),
        together,
        work=query.numel() * block_size,
    )
    return out


@numba.njit
def _heads(args, together):
    """KV heads of all sequences, numbered; so many of a task."""
    for task in tasks(args):
        for number in range(task * together, (task + 1) * together):  # noqa: UP028  (Numba has no `yield from`)
            yield number


def _most_rows(kind: str) -> int:
    return 16 if kind == "amx" else ROWS


@functools.cache
def _kernel(element: type, cache_element: type, kind: str, head_dim: int) -> Kernel:
    scaled = cache_element is not element
    pairs, with_amx, most_rows = kind in PAIRED, kind == "amx", _most_rows(kind)
    step = 2 if pairs else 1  # how many k a tile takes as one
    size = np.dtype(element).itemsize
    x_size = 2 if pairs else 4
    x_element = np.uint16 if pairs else np.float32
    value_vectors = widest(head_dim)
    columns = value_vectors * LANES
    tile_size = most_rows * columns

    @kernel
    def paged_prefill_attention(args):
        query, query_start = args[FIRST], pointer(args[FIRST + 5], np.int32)
        key_cache, value_cache = pointer(args[FIRST + 1], cache_element), pointer(args[FIRST + 2], cache_element)
        block_tables, context_lens = pointer(args[FIRST + 3], np.int32), pointer(args[FIRST + 4], np.int32)
        out = pointer(args[FIRST + 6], element)
        room, waiting = args[FIRST + 9], pointer(args[FIRST + 10], np.float32)
        max_blocks, block_size = args[FIRST + 11], args[FIRST + 12]
        num_heads, num_kv_heads = args[FIRST + 13], args[FIRST + 14]
        scale, window, span = as_float(args[FIRST + 15]), args[FIRST + 16], args[FIRST + 17]
        hidden = -np.float32(np.inf) / scale  # a score that gets no weight
        kv_scales = pointer(args[FIRST + 26], np.uint16)
        keys, values = FIRST + 18, FIRST + 22  # where the caches' strides begin: block, slot, head, feature
        key_cache_at, value_cache_at = args[FIRST + 1], args[FIRST + 2]
        straight = block_size % LANES == 0 and args[keys + 1] == 1 and args[keys + 3] == block_size
        straight = straight and args[values + 1] == head_dim and args[values + 3] == 1  # as `kv_cache` lays them out
        group = num_heads // num_kv_heads
        decodes = args[FIRST + 5] == 0  # then rows of a tile are one token's heads; otherwise one head's tokens
        row_step, heads, is_later = (1, 1, 0) if decodes else (num_heads, group, 1)
        x_stride = row_step * head_dim * x_size

        packed_keys_at = args[FIRST + 7] + thread_number(args) * args[FIRST + 8]
        packed_values_at = packed_keys_at + room * head_dim * size
        scores_at = packed_values_at + room * head_dim * size
        weights_at = scores_at + room * most_rows * 4
        packed_keys, packed_values = pointer(packed_keys_at, element), pointer(packed_values_at, element)
        scores, weights = pointer(scores_at, np.float32), pointer(weights_at, x_element)
        sums_at = buffer(tile_size)
        sums = pointer(sums_at, np.float32)
        factors = pointer(buffer(most_rows), np.float32)
        tile_room, configured = buffer(16), 0

        for task in _heads(args, args[FIRST + 27]):
            sequence, kv_head = task // num_kv_heads, task % num_kv_heads
            last_head = kv_head // args[FIRST + 27] * args[FIRST + 27] + args[FIRST + 27] - 1  # of this thread's
            context = np.int64(context_lens[sequence])
            if decodes:
                first_row, num_queries, first_position = sequence * num_heads, group, context - 1
                if context == 0:  # a spare row of a recording
                    for i in range(group * head_dim):
                        store(out, (first_row + kv_head * group) * head_dim + i, np.float32(0))
            else:
                first_query = np.int64(query_start[sequence])
                num_queries = np.int64(query_start[sequence + 1]) - first_query
                first_row, first_position = first_query * num_heads, context - num_queries
            oldest = max(0, first_position - window + 1) if window > 0 else 0
            first_start = oldest // COLUMNS * COLUMNS
            for start in range(first_start, context, room):  # a chunk of the context, and tokens are counted from there
                stop = min(start + room, (context + COLUMNS - 1) // COLUMNS * COLUMNS)
                alone = start == first_start and stop >= context
                if start == first_start and not alone:
                    for row in range(num_queries):
                        for head in range(kv_head * group, kv_head * group + heads):
                            kept = (first_row + row * row_step + head) * (head_dim + 2)
                            waiting[kept + head_dim] = np.float32(-np.inf)  # its highest score, the sum of its weights
                            for i in range(head_dim):
                                waiting[kept + i] = np.float32(0)
                            waiting[kept + head_dim + 1] = np.float32(0)

                # keys [chunk of 64 tokens][D / step][64][step], values [context / step][D][step]
                following, end = start, min(stop, context)
                while following < end:
                    token = following
                    number, following = token - start, token + 1
                    to = number // COLUMNS * COLUMNS * head_dim + number % COLUMNS * step
                    to_value = number // step * step * head_dim + number % step
                    block = np.int64(block_tables[sequence * max_blocks + token // block_size])
                    slot = token % block_size
                    key = block * args[keys] + slot * args[keys + 1] + kv_head * args[keys + 2]
                    value = block * args[values] + slot * args[values + 1] + kv_head * args[values + 2]
                    if pairs and not scaled and straight:  # sixteen at a time, also where the context ends before
                        following = token + LANES
                        later, later_head = token + AHEAD * LANES, kv_head
                        if later >= end:
                            later, later_head = start + later - end, min(kv_head + 1, last_head)
                        later = min(later, context - 1)
                        block = np.int64(block_tables[sequence * max_blocks + later // block_size])
                        slot = later // LANES * LANES % block_size
                        key_ahead = key_cache_at + (block * args[keys] + slot + later_head * args[keys + 2]) * size
                        value_ahead = (
                            value_cache_at
                            + (block * args[values] + slot * head_dim + later_head * args[values + 2]) * size
                        )
                        for i in range(0, head_dim, 2):
                            from_key = key_cache_at + (key + i * args[keys + 3]) * size
                            interleave(
                                packed_keys_at + (to + i * COLUMNS) * size, from_key, from_key + block_size * size
                            )
                            fetch(key_ahead + i * block_size * size)
                        for j in range(0, LANES, 2):
                            for i in range(0, head_dim, LANES):
                                from_value = value_cache_at + (value + j * head_dim + i) * size
                                interleave(
                                    packed_values_at + (to_value + j * head_dim + 2 * i) * size,
                                    from_value,
                                    from_value + head_dim * size,
                                )
                                fetch(value_ahead + (j * head_dim + 2 * i) * size)
                    elif scaled:
                        side = (block * num_kv_heads + kv_head) * 2 * block_size + slot
                        key_scale, value_scale = load(kv_scales, side), load(kv_scales, side + block_size)
                        for i in range(head_dim):
                            exact = load(key_cache, key + i * args[keys + 3]) * key_scale
                            store(packed_keys, to + i // step * step * COLUMNS + i % step, exact)
                            exact = load(value_cache, value + i * args[values + 3]) * value_scale
                            store(packed_values, to_value + i * step, exact)
                    else:
                        for i in range(head_dim):
                            packed_keys[to + i // step * step * COLUMNS + i % step] = key_cache[
                                key + i * args[keys + 3]
                            ]
                            packed_values[to_value + i * step] = value_cache[value + i * args[values + 3]]
                # After the context keys may be anything, since nobody sees their scores; but 0 times anything need not
                # be 0, so values are zeros there.
                if (end - start) % step:
                    for i in range(head_dim):
                        packed_values[(end - start - 1) * head_dim + i * step + 1] = element(0)
                for i in range((end - start + step - 1) // step * step * head_dim, (stop - start) * head_dim):
                    packed_values[i] = element(0)

                for head in range(kv_head * group, kv_head * group + heads):
                    for row in range(0, num_queries, most_rows):
                        num_rows = min(most_rows, num_queries - row)
                        x = query + (first_row + row * row_step + head) * head_dim * x_size
                        position = first_position + row * is_later  # of the first row
                        last = position + (num_rows - 1) * is_later
                        seen = min(context, (last // span + 1) * span)
                        low = max(0, position - window + 1) // COLUMNS * COLUMNS if window > 0 else 0
                        low = max(low, start) - start
                        high = min((seen + COLUMNS - 1) // COLUMNS * COLUMNS, stop) - start
                        if low >= high:
                            continue
                        if with_amx and num_rows != configured:
                            configured = num_rows
                            amx.configure(configured, tile_room)
                        for number in range(low // COLUMNS, high // COLUMNS):
                            chunk_keys = packed_keys_at + number * COLUMNS * head_dim * size
                            if with_amx:
                                amx.product(
                                    num_rows, x, x_stride, chunk_keys, COLUMNS * 4, head_dim // amx.DEPTH,
                                    scores_at + number * COLUMNS * 4, room * 4,
                                )  # fmt: skip
                            else:
                                tiles(
                                    kind, num_rows, VECTORS, 0, 0, x, x_stride, chunk_keys, COLUMNS * step * size,
                                    head_dim // step, scores_at + number * COLUMNS * 4, room * 4, 0, 0,
                                )  # fmt: skip
                        for i in range(num_rows):
                            position = first_position + (row + i) * is_later
                            since = max(low, position - window + 1 - start) if window > 0 else low
                            since = min(since, high)
                            until = max(since, min(high, min(context, (position // span + 1) * span) - start))
                            first, last = i * room + low, i * room + high  # whole vectors, of which it sees a part
                            for j in range(first, i * room + since):
                                scores[j] = hidden
                            for j in range(i * room + until, last):
                                scores[j] = hidden
                            largest = largest_score(scores, first, last, scale)
                            if alone:
                                factors[i] = np.float32(1) / weigh(scores, first, last, scale, largest, weights, first)
                            else:
                                kept = (first_row + (row + i) * row_step + head) * (head_dim + 2) + head_dim
                                top = waiting[kept]
                                largest = top if top > largest else largest
                                waiting[kept] = largest
                                factors[i] = exp(top - largest) if since < until else np.float32(1)
                                if since < until:
                                    total = weigh(scores, first, last, scale, largest, weights, first)
                                    waiting[kept + 1] = waiting[kept + 1] * factors[i] + total
                                else:
                                    for j in range(first, last):
                                        store(weights, j, np.float32(0))
                        for column in range(0, head_dim, columns):
                            seen_values = packed_values_at + (low * head_dim + column * step) * size
                            if with_amx:
                                amx.product(
                                    num_rows, weights_at + low * x_size, room * x_size, seen_values, head_dim * 4,
                                    (high - low) // amx.DEPTH, sums_at, columns * 4,
                                )  # fmt: skip
                            else:
                                tiles(
                                    kind, num_rows, value_vectors, 0, 0, weights_at + low * x_size, room * x_size,
                                    seen_values, head_dim * step * size, (high - low) // step, sums_at, columns * 4,
                                    0, 0,
                                )  # fmt: skip
                            for i in range(num_rows):
                                place = first_row + (row + i) * row_step + head
                                if alone:
                                    to = place * head_dim + column
                                    for j in range(columns):
                                        store(out, to + j, sums[i * columns + j] * factors[i])
                                else:
                                    kept = place * (head_dim + 2) + column
                                    for j in range(columns):
                                        waiting[kept + j] = waiting[kept + j] * factors[i] + sums[i * columns + j]

                if stop >= context and not alone:
                    for row in range(num_queries):
                        for head in range(kv_head * group, kv_head * group + heads):
                            place = first_row + row * row_step + head
                            kept = place * (head_dim + 2)
                            for i in range(head_dim):
                                store(out, place * head_dim + i, waiting[kept + i] / waiting[kept + head_dim + 1])
        if with_amx and configured > 0:
            amx.release()

    return paged_prefill_attention
