"""Every Triton kernel compiles for seven GPUs, fits their shared memory and keeps its numbers in registers.

No GPU is needed. Each dtype, constant and option that a launch can choose is compiled for each target, for the largest
of the models in `compile_cases.MODELS`; the slow tests compile all of their combinations, for all models.
"""

from collections import defaultdict
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

import pytest

from .cases import INTERPRETED
from .compiling import SHARED_MEMORY, Compiled, cases, compile_all, enough

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")


LARGEST = "Llama-3-8B"


@pytest.fixture(scope="module", params=[LARGEST, pytest.param("all models", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> dict[str, list[Compiled]]:
    results = defaultdict(list)
    labels = partial(enough, model=LARGEST) if request.param == LARGEST else cases
    for result in compile_all([(target, label) for target in SHARED_MEMORY for label in labels(target)]):
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
