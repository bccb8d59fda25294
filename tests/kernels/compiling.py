"""Compile Triton kernels for GPUs that are not there, and read from the result what they would take of them."""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature as parameters_of
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple

PACKAGE = "mini_infer.kernels.triton"
KB = 1024
SHARED_MEMORY = {  # of each target: what one program may use
    "sm_75": 64 * KB,
    "sm_80": 163 * KB,
    "sm_89": 99 * KB,
    "sm_90": 227 * KB,
    "sm_100": 227 * KB,
    "sm_120": 99 * KB,
    "gfx942": 64 * KB,
}


class Case(NamedTuple):
    """What one launch compiles. `signature` gives each argument's type, `options` num_warps and the like."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """`spilled` counts the bytes (AMD: the registers) per thread that did not fit the registers."""

    target: str
    kernel: str
    label: str
    shared_memory: int = 0
    spilled: int = 0
    error: str = ""


def gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    kind, number = target.split("_") if "_" in target else ("hip", target)
    return GPUTarget("hip", number, 64) if kind == "hip" else GPUTarget("cuda", int(number), 32)


@cache
def cases(target: str) -> dict[str, Case]:
    """Everything that the modules of the package declare for a target, by label."""
    found = {}
    for module in iter_modules(import_module(PACKAGE).__path__):
        declared = getattr(import_module(f"{PACKAGE}.{module.name}"), "compile_cases", None)
        if declared is None:
            continue
        for case in declared(gpu(target)) if parameters_of(declared).parameters else declared():
            if hasattr(case, "num_warps"):
                case = Case(case.label, case.kernel, case.signature, case.constexprs, {"num_warps": case.num_warps})
            else:
                case = Case(*case)
            if target == "sm_75" and "*bf16" in case.signature.values():
                continue  # Turing has no bfloat16
            assert case.label not in found, f"two compile cases are called {case.label!r}"
            found[case.label] = case
    return found


def compile_all(work: Iterable[tuple[str, str]], processes: int = 2) -> Iterator[Compiled]:
    """Compile (target, label) pairs; Triton's cache on disk makes a second time cheap."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_one, *zip(*work, strict=True), chunksize=4)


def compile_one(target: str, label: str) -> Compiled:
    import triton
    from triton.compiler import ASTSource

    case = cases(target)[label]
    name = case.kernel.fn.__name__
    # A launch tells the compiler which pointers and sizes are multiples of 16; ours all are, unless they are exempt.
    attributes = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in case.kernel.params
        if not parameter.do_not_specialize and re.fullmatch(r"\*.*|[iu](32|64)", case.signature[parameter.name])
    }
    try:
        source = ASTSource(case.kernel, case.signature, case.constexprs, attributes)
        compiled = triton.compile(source, target=gpu(target), options=case.options)
        spilled = _spilled_amd(compiled.asm["amdgcn"]) if "gfx" in target else _spilled_nvidia(compiled.asm["ptx"])
    except Exception as error:  # the compiler's failure is the result
        return Compiled(target, name, label, error=f"{type(error).__name__}: {error}")
    return Compiled(target, name, label, compiled.metadata.shared, spilled)


def _spilled_nvidia(ptx: str) -> int:
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(sm_(\d+)\w*)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(int(target[2])).path, "-v", f"--gpu-name={target[1]}", source, "-o", f"{source}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def _spilled_amd(assembly: str) -> int:
    return sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
