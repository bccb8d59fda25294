"""Every Triton kernel compiles for seven GPUs, fits their shared memory and keeps its numbers in registers.

No GPU is needed. All that a launch can choose is compiled for each target: for the largest of the models in
`compile_cases.MODELS`, and in the slow tests for all of them.
"""

from collections import defaultdict
from importlib import import_module
from pkgutil import iter_modules

import pytest

from .cases import INTERPRETED
from .compiling import SHARED_MEMORY, Compiled, cases, compile_all

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")


LARGEST = "Llama-3-8B"


@pytest.fixture(scope="module", params=[LARGEST, pytest.param("all models", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> dict[str, list[Compiled]]:
    model = LARGEST if request.param == LARGEST else ""
    results = defaultdict(list)
    work = [(target, label) for target in SHARED_MEMORY for label in cases(target) if model in label]
    for result in compile_all(work):
        results[result.target].append(result)
    return results


def test_every_kernel_is_compiled() -> None:
    from triton.runtime import JITFunction

    package = import_module("mini_infer.kernels.triton")
    modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
    kernels = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    compiled = {case.kernel.fn.__name__ for case in cases("sm_90").values()}
    assert compiled == {name for name in kernels if name.endswith("_kernel")}, "the others are called by these"


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_kernels_compile(compiled: dict[str, list[Compiled]], target: str) -> None:
    results = compiled[target]
    assert {r.kernel for r in results} == {case.kernel.fn.__name__ for case in cases(target).values()}
    wrong = [f"{r.label}: {r.error}" for r in results if r.error]
    wrong += [
        f"{r.label}: takes {r.shared_memory} bytes of shared memory, {target} has {SHARED_MEMORY[target]}"
        for r in results
        if r.shared_memory > SHARED_MEMORY[target]
    ]
    wrong += [f"{r.label}: {r.kernel} spills {r.spilled} bytes per thread" for r in results if r.spilled]
    assert not wrong, f"for {target}, {len(wrong)} of {len(results)}:\n" + "\n".join(wrong)
