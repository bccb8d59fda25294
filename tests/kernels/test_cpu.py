"""What only the CPU backend has: its own cache layout, several threads, other processors, other dtypes."""

import pytest
import torch

from mini_infer import kernels

from .truth import PagedCase, check

pytest.importorskip("numba", reason="the CPU backend is compiled by numba")
pytest.importorskip("hypothesis", reason="hypothesis draws the shapes of these tests")

from hypothesis import given, note, settings
from hypothesis import strategies as st


@st.composite
def cases(draw_one: st.DrawFn, *, chunks: bool) -> PagedCase:
    """Sizes that the compiled kernels take, with every group size, window and length."""
    lengths = []
    for context in draw_one(st.lists(st.integers(1, 300), min_size=1, max_size=6)):
        lengths.append((context, draw_one(st.integers(0, min(context, 100))) if chunks else 1))
    arguments = {
        "seed": draw_one(st.integers(0, 10**6)),
        "lengths": lengths,
        "block_size": draw_one(st.sampled_from([16, 32, 48, 64, 80, 256])),
        "num_kv_heads": draw_one(st.integers(1, 3)),
        "group": draw_one(st.integers(1, 9)),
        "head_dim": draw_one(st.sampled_from([16, 32, 64, 80, 96, 128])),
        "dtype": draw_one(st.sampled_from([torch.float32, torch.bfloat16])),
        "window": draw_one(st.none() | st.integers(1, 200)),
    }
    note(f"PagedCase.make(**{arguments})")
    return PagedCase.make(**arguments)


def in_own_layout(case: PagedCase) -> tuple[torch.Tensor, torch.Tensor]:
    own = kernels.allocate_kv_cache(*case.key_cache.shape, case.key_cache.dtype, "cpu")
    return own[0].copy_(case.key_cache), own[1].copy_(case.value_cache)


@pytest.mark.parametrize("threads", [1, 3])
@given(case=cases(chunks=False))
@settings(max_examples=40, deadline=None)
def test_decode(threads: int, case: PagedCase) -> None:
    torch.set_num_threads(threads)
    with kernels.use_backend("cpu"):
        caches = in_own_layout(case)
        out = kernels.paged_attention(
            case.query, *caches, case.block_tables, case.context_lens, sliding_window=case.window
        )
    check(out, case.truth(), case.query.dtype)


@pytest.mark.parametrize("threads", [1, 3])
@given(case=cases(chunks=True))
@settings(max_examples=40, deadline=None)
def test_prompts(threads: int, case: PagedCase) -> None:
    torch.set_num_threads(threads)
    with kernels.use_backend("cpu"):
        caches = in_own_layout(case)
        out = kernels.paged_prefill_attention(
            case.query, *caches, case.block_tables, case.context_lens, case.query_start, sliding_window=case.window
        )
    check(out, case.truth(), case.query.dtype)
