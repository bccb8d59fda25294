"""Shapes, chunk lengths and layouts that nobody thought of; a failure prints the case and its seed."""

import pytest
import torch
from torch.nn.functional import rms_norm

from mini_infer import kernels

from .cases import INTERPRETED
from .truth import DTYPES, PagedCase, check, check_sum, draw, on_backends, rotate, strided

pytest.importorskip("hypothesis", reason="hypothesis draws the shapes of these tests")

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

# The backend fixture is a choice that all examples share, so it needs no reset between them.
few = settings(
    max_examples=8 if INTERPRETED else 60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
seeds = st.integers(0, 10**6)
dtypes = st.sampled_from(DTYPES)
windows = st.fixed_dictionaries({"window": st.none() | st.integers(1, 70)})
what_is_seen = windows | st.fixed_dictionaries({"span": st.integers(2, 70)})


@st.composite
def paged_cases(draw_one: st.DrawFn, *, chunks: bool) -> PagedCase:
    lengths = []
    for context in draw_one(st.lists(st.integers(1, 60), min_size=1, max_size=5)):
        lengths.append((context, draw_one(st.integers(0, min(context, 20))) if chunks else 1))
    arguments = {
        "seed": draw_one(seeds),
        "lengths": lengths,
        "block_size": draw_one(st.sampled_from([*range(1, 33), 512])),
        "num_kv_heads": draw_one(st.integers(1, 4)),
        "group": draw_one(st.integers(1, 5)),
        # In fewer dimensions an average of values now and then cancels to almost nothing, and any rounding is "large".
        "head_dim": draw_one(st.integers(6, 40)),
        "dtype": draw_one(dtypes),
        "index_dtype": draw_one(st.sampled_from([torch.int32, torch.int64])),
        **draw_one(what_is_seen if chunks else windows),
        "spare_columns": draw_one(st.integers(0, 3)),
    }
    note(f"PagedCase.make(**{arguments})")
    return PagedCase.make(**arguments)


@given(case=paged_cases(chunks=False))
@few
@on_backends("paged_attention")
def test_decode(backend: str, case: PagedCase) -> None:
    out = kernels.paged_attention(
        case.query,
        case.key_cache,
        case.value_cache,
        case.block_tables,
        case.context_lens,
        sliding_window=case.window,
    )
    check(out, case.truth(), case.key_cache.dtype)


@given(case=paged_cases(chunks=True))
@few
@on_backends("paged_prefill_attention")
def test_prefill(backend: str, case: PagedCase) -> None:
    out = kernels.paged_prefill_attention(
        case.query,
        case.key_cache,
        case.value_cache,
        case.block_tables,
        case.context_lens,
        case.query_start,
        sliding_window=case.window,
        span=case.span,
    )
    check(out, case.truth(), case.key_cache.dtype)


@given(leading=st.lists(st.integers(0, 5), max_size=3), size=st.integers(1, 300), dtype=dtypes, seed=seeds)
@few
@on_backends("rmsnorm")
def test_rmsnorm(backend: str, leading: list[int], size: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = draw(seed, *leading, size, dtype=dtype), draw(seed + 1, size, dtype=dtype)
    check(kernels.rmsnorm(strided(x), weight), rms_norm(x.double(), (size,), weight.double(), 1e-6), dtype)


@given(
    tokens=st.integers(0, 6),
    num_heads=st.integers(1, 5),
    num_kv_heads=st.integers(1, 5),
    half=st.integers(0, 20),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@few
@on_backends("apply_rotary_emb")
def test_rotary(
    backend: str,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    half: int,
    rest: int,
    interleaved: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    head_dim = max(1, 2 * half + rest)
    q, k = (
        draw(seed, tokens, num_heads, head_dim, dtype=dtype),
        draw(seed + 1, tokens, num_kv_heads, head_dim, dtype=dtype),
    )
    angles = draw(seed + 2, 30, half)
    positions = torch.randint(0, 30, (tokens,), generator=torch.Generator().manual_seed(seed))
    out_q, out_k = kernels.apply_rotary_emb(q, k, angles.cos(), angles.sin(), positions, interleaved=interleaved)
    check(out_q, rotate(q, angles.cos(), angles.sin(), positions, interleaved), dtype)
    check(out_k, rotate(k, angles.cos(), angles.sin(), positions, interleaved), dtype)


@given(leading=st.lists(st.integers(0, 5), max_size=3), size=st.integers(1, 300), dtype=dtypes, seed=seeds)
@few
@on_backends("add_rmsnorm")
def test_add_rmsnorm(backend: str, leading: list[int], size: int, dtype: torch.dtype, seed: int) -> None:
    x, residual = draw(seed, *leading, size, dtype=dtype), draw(seed + 1, *leading, size, dtype=dtype)
    weight = draw(seed + 2, size, dtype=dtype)
    normed, total = kernels.add_rmsnorm(x, strided(residual), weight)
    check_sum(total, x.double() + residual.double(), dtype)
    check(normed, rms_norm(total.double(), (size,), weight.double(), 1e-6), dtype)


@given(leading=st.lists(st.integers(0, 5), max_size=3), half=st.integers(1, 200), dtype=dtypes, seed=seeds)
@few
@on_backends("silu_and_mul")
def test_silu_and_mul(backend: str, leading: list[int], half: int, dtype: torch.dtype, seed: int) -> None:
    x = draw(seed, *leading, 2 * half, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    check(kernels.silu_and_mul(strided(x)), gate * gate.sigmoid() * up, dtype)


@given(
    num_blocks=st.integers(1, 6),
    block_size=st.sampled_from([*range(1, 18), 64]),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    dtype=dtypes,
    seed=seeds,
)
@few
@on_backends("write_kv")
def test_write_kv(
    backend: str,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    index_dtype: torch.dtype,
    dtype: torch.dtype,
    seed: int,
) -> None:
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(seed))[::2]
    slots[1::3] = -1
    shape = (len(slots), num_kv_heads, head_dim)
    key, value = draw(seed, *shape, dtype=dtype), draw(seed + 1, *shape, dtype=dtype)
    key_cache = torch.full((num_blocks, block_size, num_kv_heads, head_dim), 7.0, dtype=dtype)
    value_cache = key_cache + 1
    expected = key_cache.clone(), value_cache.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot // block_size, slot % block_size] = key[t]
            expected[1][slot // block_size, slot % block_size] = value[t]
    kernels.write_kv(strided(key), value, key_cache, value_cache, slots.to(index_dtype))
    assert torch.equal(key_cache, expected[0]) and torch.equal(value_cache, expected[1])
