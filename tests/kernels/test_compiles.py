"""Every Triton kernel compiles for seven GPUs, fits their shared memory and keeps its numbers in registers.

No GPU is needed. By default the configurations of all models compile for sm_90, and each kernel at least once, with
another configuration each time, for every other target; `slow` adds the rest.
"""

from collections import defaultdict

import pytest

from .compiling import SHARED_MEMORY, Compiled, cases, compile_all
from .truth import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")

FULL = "sm_90"

ALLOWED_SPILLS: dict[tuple[str, str], str] = {}
"""(kernel, target) and why it may spill."""


@pytest.fixture(scope="module")
def some() -> dict[str, list[Compiled]]:
    return compile_by_target(
        [(target, label) for target in SHARED_MEMORY for label in (cases(target) if target == FULL else chosen(target))]
    )


def chosen(target: str) -> list[str]:
    """One label of each kernel, not the same for each target."""
    labels = defaultdict(list)
    for label, case in cases(target).items():
        labels[case.kernel.fn.__name__].append(label)
    turn = list(SHARED_MEMORY).index(target)
    return [those[turn % len(those)] for those in labels.values()]


def compile_by_target(work: list[tuple[str, str]]) -> dict[str, list[Compiled]]:
    results = defaultdict(list)
    for result in compile_all(work):
        results[result.target].append(result)
    return results


def check(results: list[Compiled], target: str) -> None:
    assert results
    wrong = [f"{r.label}: {r.error}" for r in results if r.error]
    wrong += [
        f"{r.label}: takes {r.shared_memory} bytes of shared memory, {target} has {SHARED_MEMORY[target]}"
        for r in results
        if r.shared_memory > SHARED_MEMORY[target]
    ]
    wrong += [
        f"{r.label}: {r.kernel} spills {r.spilled} {'registers' if 'gfx' in target else 'bytes'} per thread"
        for r in results
        if r.spilled and (r.kernel, target) not in ALLOWED_SPILLS
    ]
    assert not wrong, f"for {target}, {len(wrong)} of {len(results)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_kernels_compile(some: dict[str, list[Compiled]], target: str) -> None:
    check(some[target], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_everything_compiles(target: str) -> None:
    check(compile_by_target([(target, label) for label in cases(target)])[target], target)
