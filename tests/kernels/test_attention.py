from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mini_infer import kernels

from .truth import DTYPES, PagedCase, check, draw, on_backends, strided

SHAPES = [  # block_size, num_kv_heads, group, head_dim
    (1, 1, 1, 8),
    (4, 2, 2, 16),
    (5, 3, 3, 33),
    (16, 1, 8, 64),
    (32, 2, 7, 7),
    (512, 2, 1, 8),  # a row of one number may cancel to almost nothing, where any rounding is large
]
CODES = [torch.int8, torch.float8_e4m3fn]
RAGGED = [1, 4, 5, 37, 16, 17]
CHUNKS = [(5, 5), (1, 1), (37, 6), (16, 16), (33, 1), (8, 0), (20, 12)]


def decode(case: PagedCase) -> torch.Tensor:
    return kernels.paged_attention(
        case.query,
        case.key_cache,
        case.value_cache,
        case.block_tables,
        case.context_lens,
        scale=case.scale,
        sliding_window=case.window,
    )


def prefill(case: PagedCase) -> torch.Tensor:
    return kernels.paged_prefill_attention(
        case.query,
        case.key_cache,
        case.value_cache,
        case.block_tables,
        case.context_lens,
        case.query_start,
        scale=case.scale,
        sliding_window=case.window,
        span=case.span,
    )


def attention(case: PagedCase, num_decodes: int) -> torch.Tensor:
    """All new tokens of the case in one call, which finds their places in the cache empty."""
    block_size = case.key_cache.shape[1]
    news = [len(queries) for queries in case.queries]
    slots = [
        int(table[j // block_size]) * block_size + j % block_size
        for table, keys, new in zip(case.block_tables, case.keys, news, strict=True)
        for j in range(len(keys) - new, len(keys))
    ]
    for slot in slots:
        case.key_cache[slot // block_size, slot % block_size] = torch.nan
        case.value_cache[slot // block_size, slot % block_size] = torch.inf
    metadata = kernels.AttentionMetadata(
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_start_loc=case.query_start,
        prefill_start_loc=case.query_start[num_decodes:] - num_decodes,
        context_lens=case.context_lens,
        block_tables=case.block_tables,
        num_decodes=num_decodes,
        span=case.span,
    )
    new_keys, new_values = (
        torch.cat([x[len(x) - new :] for x, new in zip(cached, news, strict=True)]) if cached else case.key_cache[0, :0]
        for cached in (case.keys, case.values)
    )
    return kernels.attention(
        case.query,
        new_keys,
        new_values,
        case.key_cache,
        case.value_cache,
        metadata,
        scale=case.scale,
        sliding_window=case.window,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "num_decodes"),
    [
        ([(9, 1), (1, 1), (40, 1)], 3),
        ([(9, 1), (1, 1), (40, 1)], 0),
        ([(9, 1), (7, 7), (40, 12), (5, 1)], 1),
        ([(9, 1), (7, 0)], 1),
        ([(12, 12), (40, 3)], 0),
        ([], 0),
    ],
    ids=str,
)
@on_backends("attention")
def test_one_call_writes_and_attends(
    backend: str, lengths: list[tuple[int, int]], num_decodes: int, dtype: torch.dtype
) -> None:
    case = PagedCase.make(31, lengths, block_size=16, dtype=dtype, scale=0.2, window=30)
    check(attention(case, num_decodes), case.truth(), dtype)


@pytest.mark.parametrize("span", [1, 2, 5, 16, 37, 1000])
@on_backends("attention")
def test_neighbours_within_a_span_see_each_other(backend: str, span: int) -> None:
    case = PagedCase.make(32, [(37, 37), (60, 20), (16, 16), (5, 3)], block_size=16, span=span)
    check(attention(case, 0), case.truth(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_backends("paged_attention")
def test_decode_is_the_formula(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    block_size, num_kv_heads, group, head_dim = shape
    case = PagedCase.make(
        1,
        [(length, 1) for length in RAGGED],
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=dtype,
    )
    check(decode(case), case.truth(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_backends("paged_prefill_attention")
def test_prefill_is_the_formula(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    block_size, num_kv_heads, group, head_dim = shape
    case = PagedCase.make(
        2,
        CHUNKS,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=dtype,
    )
    check(prefill(case), case.truth(), dtype)


def in_codes(case: PagedCase, dtype: torch.dtype) -> tuple[PagedCase, torch.Tensor]:
    """The same sequences with a cache of codes, which are any numbers, and what they stand for; and the scales."""
    num_blocks, block_size, num_kv_heads, _ = shape = case.key_cache.shape
    caches = [draw(seed, *shape).mul(30).to(dtype) for seed in (71, 72)]
    scales = draw(73, num_blocks, num_kv_heads, 2, block_size).abs().add(0.1).mul(0.02).bfloat16()
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    numbers: list[list[torch.Tensor]] = []
    for which, cache in enumerate(caches):
        rows = []
        for table, keys in zip(case.block_tables.tolist(), case.keys, strict=True):
            places = [(table[j // block_size], j % block_size) for j in range(len(keys))]
            for block, offset in places:
                used[block, offset] = True
            stored = [
                torch.stack([cache[b, o, h].double() * scales[b, h, which, o].double() for h in range(num_kv_heads)])
                for b, o in places
            ]
            rows.append(torch.stack(stored) if stored else keys.double())
        numbers.append(rows)
    scales.masked_fill_(~used[:, None, None], torch.nan)
    return replace(case, key_cache=caches[0], value_cache=caches[1], keys=numbers[0], values=numbers[1]), scales


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_backends("paged_attention")
def test_decode_over_codes(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype, codes: torch.dtype
) -> None:
    block_size, num_kv_heads, group, head_dim = shape
    sizes = {"block_size": block_size, "num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim}
    lengths = [(length, 1) for length in RAGGED]
    case, scales = in_codes(PagedCase.make(41, lengths, dtype=dtype, window=30, **sizes), codes)
    arguments = case.query, case.key_cache, case.value_cache, case.block_tables, case.context_lens
    out = kernels.paged_attention(*arguments, sliding_window=case.window, kv_scales=scales)
    check(out, case.truth(), dtype)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_backends("paged_prefill_attention")
def test_prefill_over_codes(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype, codes: torch.dtype
) -> None:
    block_size, num_kv_heads, group, head_dim = shape
    sizes = {"block_size": block_size, "num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim}
    case, scales = in_codes(PagedCase.make(42, CHUNKS, dtype=dtype, **sizes), codes)
    caches = case.key_cache, case.value_cache, case.block_tables, case.context_lens, case.query_start
    check(kernels.paged_prefill_attention(case.query, *caches, kv_scales=scales), case.truth(), dtype)


@pytest.mark.parametrize("codes", CODES, ids=str)
@on_backends("attention")
def test_one_call_writes_codes_and_attends(backend: str, codes: torch.dtype) -> None:
    """A decode beside a prompt, into an allocated cache; off by no more than what 8 bits cost."""
    case = PagedCase.make(43, [(1, 1), (40, 40)], block_size=16, head_dim=64)
    caches = kernels.allocate_kv_cache(*case.key_cache.shape, codes, "cpu")
    assert caches[2].shape == (len(case.key_cache), 2, 2, 16) and caches[2].dtype is torch.bfloat16
    slots = [
        int(table[j // 16]) * 16 + j % 16
        for table, keys in zip(case.block_tables, case.keys, strict=True)
        for j in range(len(keys))
    ]
    metadata = kernels.AttentionMetadata(
        torch.tensor(slots), case.query_start, torch.tensor([0, 40]), case.context_lens, case.block_tables, 1
    )
    new = torch.cat(case.keys), torch.cat(case.values)
    out = kernels.attention(case.query, *new, *caches[:2], metadata, kv_scales=caches[2])
    error = (out.double() - case.truth()).norm() / case.truth().norm()
    assert 0 < error < {torch.int8: 0.01, torch.float8_e4m3fn: 0.05}[codes]


@pytest.mark.parametrize("shape", [(4, 1, 1, 300), (4, 1, 70, 8), (4, 1, 130, 128)], ids=str)
@on_backends("paged_attention")
def test_heads_and_groups_beyond_any_tile(backend: str, shape: tuple[int, int, int, int]) -> None:
    block_size, num_kv_heads, group, head_dim = shape
    sizes = {"block_size": block_size, "num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim}
    case = PagedCase.make(21, [(9, 1), (2, 1)], **sizes)
    check(decode(case), case.truth(), torch.float32)
    case = PagedCase.make(22, [(9, 4), (2, 2)], **sizes)
    check(prefill(case), case.truth(), torch.float32)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 16, 36, 37, 1000])
@on_backends("paged_attention")
def test_decode_in_a_sliding_window(backend: str, window: int) -> None:
    case = PagedCase.make(3, [(length, 1) for length in RAGGED], window=window)
    check(decode(case), case.truth(), torch.float32)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 16, 36, 37, 1000])
@on_backends("paged_prefill_attention")
def test_prefill_in_a_sliding_window(backend: str, window: int) -> None:
    case = PagedCase.make(4, CHUNKS, window=window)
    check(prefill(case), case.truth(), torch.float32)


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
@on_backends("paged_attention")
def test_decode_with_its_own_scale(backend: str, scale: float) -> None:
    case = PagedCase.make(5, [(9, 1), (2, 1)], scale=scale)
    check(decode(case), case.truth(), torch.float32)


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
@on_backends("paged_prefill_attention")
def test_prefill_with_its_own_scale(backend: str, scale: float) -> None:
    case = PagedCase.make(6, [(9, 4), (2, 2)], scale=scale)
    check(prefill(case), case.truth(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-3, 8.0, 40.0])
@on_backends("paged_attention")
def test_decode_of_large_and_small_numbers(backend: str, magnitude: float, dtype: torch.dtype) -> None:
    case = PagedCase.make(7, [(30, 1), (3, 1)], magnitude=magnitude, dtype=dtype)
    check(decode(case), case.truth(), dtype, slack=max(1.0, magnitude**2))  # a score's error is in proportion to it


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-3, 8.0, 40.0])
@on_backends("paged_prefill_attention")
def test_prefill_of_large_and_small_numbers(backend: str, magnitude: float, dtype: torch.dtype) -> None:
    case = PagedCase.make(8, [(30, 9), (3, 3)], magnitude=magnitude, dtype=dtype)
    check(prefill(case), case.truth(), dtype, slack=max(1.0, magnitude**2))


@on_backends("paged_prefill_attention")
def test_a_whole_prompt_equals_torch_attention(backend: str) -> None:
    case = PagedCase.make(9, [(50, 50)], num_kv_heads=2, group=3, head_dim=24)
    q, k, v = (x.transpose(0, 1)[None] for x in (case.query, case.keys[0], case.values[0]))
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    check(prefill(case), theirs, torch.float32)


@on_backends("paged_prefill_attention")
def test_chunks_give_what_the_whole_prompt_gives(backend: str) -> None:
    whole = PagedCase.make(10, [(23, 23)], window=9)
    caches = whole.key_cache, whole.value_cache, whole.block_tables
    pieces = [
        kernels.paged_prefill_attention(
            whole.query[start:end],
            *caches,
            torch.tensor([end]),
            torch.tensor([0, end - start]),
            sliding_window=9,
        )
        for start, end in ((0, 1), (1, 8), (8, 20), (20, 23))
    ]
    check(torch.cat(pieces), whole.truth(), torch.float32)


@on_backends("paged_attention")
def test_decode_equals_a_chunk_of_one(backend: str) -> None:
    case = PagedCase.make(11, [(length, 1) for length in RAGGED], window=6, index_dtype=torch.int64)
    check(decode(case), prefill(case).double(), torch.float32)


@on_backends("paged_attention")
def test_sequences_may_share_blocks(backend: str) -> None:
    case = PagedCase.make(12, [(12, 1)], block_size=4)
    query = draw(13, 3, 4, 16, dtype=torch.float32)
    lengths = [12, 8, 5]
    out = kernels.paged_attention(
        query, case.key_cache, case.value_cache, case.block_tables.expand(3, -1), torch.tensor(lengths)
    )
    for row, length in enumerate(lengths):
        alone = PagedCase(
            [query[row : row + 1]],
            [case.keys[0][:length]],
            [case.values[0][:length]],
            case.key_cache,
            case.value_cache,
            case.block_tables,
            case.context_lens,
            case.query_start,
            scale=None,
            window=None,
            span=1,
        )
        check(out[row : row + 1], alone.truth(), torch.float32)


@on_backends("paged_attention")
def test_decode_of_strided_tensors(backend: str) -> None:
    case = PagedCase.make(14, [(9, 1), (4, 1)], block_size=4)
    heads_first = case.key_cache.transpose(1, 2).contiguous().transpose(1, 2)
    tables = torch.stack((case.block_tables, case.block_tables), dim=-1)[..., 0]
    lengths = torch.stack((case.context_lens, case.context_lens), dim=-1)[..., 0]
    out = kernels.paged_attention(strided(case.query), heads_first, strided(case.value_cache), tables, lengths)
    check(out, case.truth(), torch.float32)


@on_backends("paged_prefill_attention")
def test_prefill_of_strided_tensors(backend: str) -> None:
    case = PagedCase.make(15, [(9, 5), (4, 4)], block_size=4)
    heads_first = case.key_cache.transpose(1, 2).contiguous().transpose(1, 2)
    tables = torch.stack((case.block_tables, case.block_tables), dim=-1)[..., 0]
    starts = torch.stack((case.query_start, case.query_start), dim=-1)[..., 0]
    out = kernels.paged_prefill_attention(
        strided(case.query), heads_first, strided(case.value_cache), tables, case.context_lens, starts
    )
    check(out, case.truth(), torch.float32)


@on_backends("paged_attention")
def test_a_padding_row_gets_zeros_and_disturbs_nobody(backend: str) -> None:
    case = PagedCase.make(16, [(9, 1), (6, 1), (4, 1)], block_size=4)
    padded = case.context_lens.clone()
    padded[1] = 0
    case.block_tables[1] = 10**6
    out = kernels.paged_attention(case.query, case.key_cache, case.value_cache, case.block_tables, padded)
    check(out[[0, 2]], case.truth()[[0, 2]], torch.float32)
    assert not out[1].any()


@on_backends("paged_attention")
def test_decode_of_no_sequences(backend: str) -> None:
    case = PagedCase.make(17, [], group=1)
    assert decode(case).shape == (0, 2, 16)


@on_backends("paged_prefill_attention")
def test_prefill_of_nothing(backend: str) -> None:
    assert prefill(PagedCase.make(18, [], group=1)).shape == (0, 2, 16)
    assert prefill(PagedCase.make(19, [(8, 0), (3, 0)])).shape == (0, 4, 16)


@on_backends("paged_attention")
def test_write_then_read_through_an_allocated_cache(backend: str) -> None:
    key_cache, value_cache = kernels.allocate_kv_cache(8, 4, 2, 16, torch.float32, "cpu")
    case = PagedCase.make(20, [(11, 1)], num_kv_heads=2, head_dim=16)
    table = torch.tensor([[6, 1, 3]])
    slots = torch.tensor([int(table[0, j // 4]) * 4 + j % 4 for j in range(11)])
    kernels.write_kv(case.keys[0], case.values[0], key_cache, value_cache, slots)
    out = kernels.paged_attention(case.query, key_cache, value_cache, table, case.context_lens)
    check(out, case.truth(), torch.float32)
