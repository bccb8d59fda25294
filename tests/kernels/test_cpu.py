"""What only the CPU backend has: its own cache layout, several threads, other processors, other dtypes."""

import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mini_infer import kernels

from .truth import PagedCase, check

pytest.importorskip("numba", reason="the CPU backend is compiled by numba")
pytest.importorskip("hypothesis", reason="hypothesis draws the shapes of these tests")

from hypothesis import given, note, settings
from hypothesis import strategies as st


@pytest.fixture(params=[1, 3], scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


windows = st.fixed_dictionaries({"window": st.none() | st.integers(1, 200)})
what_is_seen = windows | st.fixed_dictionaries({"span": st.integers(2, 400)})


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
        **draw_one(what_is_seen if chunks else windows),
    }
    note(f"PagedCase.make(**{arguments})")
    return PagedCase.make(**arguments)


def in_own_layout(case: PagedCase) -> tuple[torch.Tensor, torch.Tensor]:
    own = kernels.allocate_kv_cache(*case.key_cache.shape, case.key_cache.dtype, "cpu")
    return own[0].copy_(case.key_cache), own[1].copy_(case.value_cache)


@given(case=cases(chunks=False))
@settings(max_examples=40, deadline=None)
def test_decode(threads: int, case: PagedCase) -> None:
    with kernels.use_backend("cpu"):
        caches = in_own_layout(case)
        out = kernels.paged_attention(
            case.query, *caches, case.block_tables, case.context_lens, sliding_window=case.window
        )
    check(out, case.truth(), case.query.dtype)


@given(case=cases(chunks=True))
@settings(max_examples=40, deadline=None)
def test_prompts(threads: int, case: PagedCase) -> None:
    with kernels.use_backend("cpu"):
        caches = in_own_layout(case)
        out = kernels.paged_prefill_attention(
            case.query,
            *caches,
            case.block_tables,
            case.context_lens,
            case.query_start,
            sliding_window=case.window,
            span=case.span,
        )
    check(out, case.truth(), case.query.dtype)


PROGRAM = textwrap.dedent("""
    import torch
    from mini_infer import kernels

    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        def draw(*shape):
            return torch.randn(shape).to(dtype)

        caches = draw(12, 16, 2, 64), draw(12, 16, 2, 64)
        tables = torch.randperm(12).view(2, 6).int()
        lengths = torch.tensor([70, 33]).int()
        query, weight, x = draw(2, 6, 64), draw(130, 96), draw(13, 96)

        def results(backend):
            with kernels.use_backend(backend):
                own = kernels.allocate_kv_cache(12, 16, 2, 64, dtype, "cpu")
                own = [mine.copy_(given) for mine, given in zip(own, caches)]
                starts = torch.tensor([0, 1, 2]).int()
                return [
                    kernels.pack_linear(weight)(x),
                    kernels.rmsnorm(x, x[0]),
                    kernels.silu_and_mul(x),
                    kernels.paged_attention(query, *own, tables, lengths),
                    kernels.paged_prefill_attention(query, *own, tables, lengths, starts),
                    kernels.argmax_logprob(x)[1],
                ]

        for fast, slow in zip(results("cpu"), results("reference")):
            error = (fast.double() - slow.double()).norm() / slow.double().norm()
            assert error < tolerance, (dtype, float(error))
    from mini_infer.kernels.cpu.tile import LANES, PAIRS
    print(LANES, PAIRS)
""")


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="plays older x86 processors")
@pytest.mark.parametrize(
    ("name", "features", "expected"),
    [
        ("haswell", "+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2,+avx", "8 False"),
        ("skylake", "+avx2,+fma,+avx", "8 False"),
    ],
)
def test_a_processor_with_avx2_alone(name: str, features: str, expected: str) -> None:
    done = run(PROGRAM, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_compiled_kernels_are_found_again(tmp_path: Path) -> None:
    """Whatever a kernel depends on has the same name in every process; otherwise each would compile anew."""
    found = []
    for _ in range(2):
        done = run(PROGRAM, XDG_CACHE_HOME=str(tmp_path), NUMBA_CACHE_DIR="")
        assert done.returncode == 0, done.stderr
        found.append(sorted(path.name for path in tmp_path.rglob("*.nbc")))
    assert found[0] and found[1] == found[0]


def test_without_numba_the_reference_runs_and_says_so() -> None:
    program = """
        import logging, sys
        sys.modules["numba"] = None
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        from mini_infer import LLM
        from mini_infer import kernels
        llm = LLM(device="cpu")
        assert kernels.backend_of("paged_attention") == "reference"
        print(llm.generate("What is a KV cache?", max_tokens=3)[0].text)
    """
    done = run(textwrap.dedent(program), OMP_NUM_THREADS="1")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert done.stderr.count("pip install 'mini-infer[cpu]'") == 1
