"""What only the CPU backend has: its own cache layout, several threads, other processors, other dtypes."""

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mini_infer
from mini_infer import kernels

from .truth import PagedCase, check

pytest.importorskip("numba", reason="the CPU backend is compiled by numba")
pytest.importorskip("hypothesis", reason="hypothesis draws the shapes of these tests")

from hypothesis import given, note, settings
from hypothesis import strategies as st

from mini_infer.kernels.cpu import paged_attention, prefill_attention

windows = st.fixed_dictionaries({"window": st.none() | st.integers(1, 200)})
what_is_seen = windows | st.fixed_dictionaries({"span": st.integers(2, 400)})


SIZES = [
    {"block_size": block_size, "num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim}
    for block_size, num_kv_heads, group, head_dim in (
        (16, 2, 1, 64),
        (16, 1, 2, 128),
        (48, 3, 3, 32),
        (256, 2, 4, 16),
        (80, 1, 7, 96),
        (32, 2, 9, 80),
    )
]


@pytest.fixture(params=[(1, 4096), (3, 64)], ids=["whole", "in chunks"], scope="module")
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    """On one thread, with contexts computed in one piece; or on three, at most 64 tokens at a time."""
    before = torch.get_num_threads()
    threads, chunk = request.param
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "CHUNK", chunk)
        patch.setattr(prefill_attention, "CHUNK", chunk)
        yield
    torch.set_num_threads(before)


@st.composite
def cases(draw_one: st.DrawFn, *, chunks: bool) -> PagedCase:
    """Any window, span and lengths, for a few sizes that the compiled kernels take, since each is compiled apart."""
    lengths = []
    for context in draw_one(st.lists(st.integers(1, 300), min_size=1, max_size=6)):
        lengths.append((context, draw_one(st.integers(0, min(context, 40))) if chunks else 1))
    arguments = {
        "seed": draw_one(st.integers(0, 10**6)),
        "lengths": lengths,
        **draw_one(st.sampled_from(SIZES)),
        "dtype": draw_one(st.sampled_from([torch.float32, torch.bfloat16])),
        **draw_one(what_is_seen if chunks else windows),
    }
    note(f"PagedCase.make(**{arguments})")
    return PagedCase.make(**arguments)


def in_own_layout(case: PagedCase) -> tuple[torch.Tensor, torch.Tensor]:
    own = kernels.allocate_kv_cache(*case.key_cache.shape, case.key_cache.dtype, "cpu")
    return own[0].copy_(case.key_cache), own[1].copy_(case.value_cache)


@given(case=cases(chunks=False))
@settings(max_examples=20, deadline=None)
def test_decode(how: None, case: PagedCase) -> None:
    with kernels.use_backend("cpu"):
        caches = in_own_layout(case)
        out = kernels.paged_attention(
            case.query, *caches, case.block_tables, case.context_lens, sliding_window=case.window
        )
    check(out, case.truth(), case.query.dtype)


@given(case=cases(chunks=True))
@settings(max_examples=20, deadline=None)
def test_prompts(how: None, case: PagedCase) -> None:
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
        nibbles = torch.randint(0, 256, (130, 48), dtype=torch.uint8)
        of_groups, odd = torch.rand(130, 3) / 8 + 0.1, torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10.0])
        quantized = [
            kernels.QuantizedMatrix(torch.randint(-128, 128, (130, 96), dtype=torch.int8), of_groups[:, :1], 96),
            kernels.QuantizedMatrix(nibbles, of_groups, 32, -8 * of_groups),
            kernels.QuantizedMatrix(nibbles, of_groups, 32, None, torch.cat((odd, -odd))),
        ]

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
                    *(kernels.pack_quantized(matrix, None, dtype)(x) for matrix in quantized),
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


IS_X86 = platform.machine() in ("x86_64", "AMD64")
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2,+avx"}


@pytest.mark.skipif(not IS_X86, reason="plays an older x86 processor")
def test_a_processor_with_avx2_alone() -> None:
    """One that does not convert float16 either; another is played where kernels are found again."""
    features = {"NUMBA_CPU_NAME": "skylake", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx"}
    done = run(PROGRAM, OMP_NUM_THREADS="2", **features)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8 False"


SILU = """
import logging, sys, torch
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from mini_infer import kernels
x = torch.linspace(-3, 3, 64).reshape(2, 32)
cpu = kernels.resolve("cpu", "cpu")
print(cpu.silu_and_mul(x).tolist())
print(cpu.rmsnorm(x, x[0]).tolist())
"""


def kept(directory: Path) -> dict[str, int]:
    """The files of compiled kernels, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def in_the_installation() -> list[Path]:
    return [path for suffix in ("nbi", "nbc") for path in Path(mini_infer.__path__[0]).rglob(f"*.{suffix}")]


def silu(cache: Path, prelude: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Two kernels in a process of its own, right or wrong."""
    done = run(prelude + SILU, **{"XDG_CACHE_HOME": str(cache), "NUMBA_CACHE_DIR": "", **environment})
    assert done.returncode == 0, done.stderr
    assert not in_the_installation()
    return done


def test_compiled_kernels_are_found_again(tmp_path: Path) -> None:
    """Whatever a kernel depends on has the same name in every process; otherwise each would compile anew. An x86
    processor plays an older one, with AVX2 and float16."""
    found = []
    for _ in range(2):
        processor = HASWELL if IS_X86 else {}
        done = run(PROGRAM, XDG_CACHE_HOME=str(tmp_path), NUMBA_CACHE_DIR="", OMP_NUM_THREADS="2", **processor)
        assert done.returncode == 0, done.stderr
        assert not IS_X86 or done.stdout.strip() == "8 False"
        found.append(kept(tmp_path))
    assert found[0] and found[1] == found[0]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the two kernels give, and where they are kept from then on."""
    directory = tmp_path_factory.mktemp("fresh")
    return silu(directory).stdout, directory


def test_a_damaged_file_is_not_run(fresh: tuple[str, Path], tmp_path: Path) -> None:
    shutil.copytree(fresh[1], tmp_path, dirs_exist_ok=True)
    first, second = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    content = bytearray(first.read_bytes())
    content[-1000] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:500])
    again = silu(tmp_path)
    assert again.stdout == fresh[0] and again.stderr.count(" is damaged;") == 2
    assert silu(tmp_path).stderr == "", "both were put in order"


def test_a_changed_source_is_compiled_anew(fresh: tuple[str, Path], tmp_path: Path) -> None:
    """The kernel's own file is as it was; it is a function that it calls, in another file, that changes."""
    shutil.copytree(Path(mini_infer.__path__[0]), tmp_path / "mini_infer")
    jit = tmp_path / "mini_infer" / "kernels" / "cpu" / "jit.py"
    source = jit.read_text(encoding="utf-8")
    assert source.count("np.float32(0.6931471805599453)") == 1  # of the exponential
    jit.write_text(source.replace("np.float32(0.6931471805599453)", "np.float32(0.5)"), encoding="utf-8")
    assert silu(fresh[1], f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n").stdout != fresh[0]
    assert silu(fresh[1]).stdout == fresh[0]


@pytest.mark.parametrize("fault", ["no directory", "no home", "a full disk"])
def test_without_a_place_to_keep_them_kernels_are_compiled(fresh: tuple[str, Path], tmp_path: Path, fault: str) -> None:
    prelude = ""
    if fault == "no directory":
        (tmp_path / "nowhere").touch()
    elif fault == "no home":
        prelude = "import os, pathlib\ndel os.environ['XDG_CACHE_HOME']\n"
        prelude += "def home(): raise RuntimeError\npathlib.Path.home = home\n"
    else:
        pytest.importorskip("resource", reason="limits a process's files")
        prelude = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    done = silu(tmp_path / "nowhere", prelude)
    assert done.stdout == fresh[0]
    assert done.stderr.count("compiled kernels cannot be kept in") == (fault != "no home")
    assert not kept(tmp_path / "nowhere")


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
