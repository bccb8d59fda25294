"""Compile Triton kernels for GPUs that are not there, and read from the result what they would take of them."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

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


@dataclass(frozen=True)
class Compiled:
    """`spilled` counts the bytes of memory per thread that took what did not fit the registers."""

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
def cases(target: str) -> dict[str, Any]:
    """The compile cases for a target, by label; what compiles to the same thing only once."""
    from mini_infer.kernels.triton.launch import Device

    from .compile_cases import compile_cases

    float8 = target in ("sm_89", "sm_90", "sm_100", "sm_120")
    num_sms = 132  # which compile into nothing
    device = Device(
        SHARED_MEMORY[target], num_sms, tensor_cores=target != "sm_75", float8=float8, lanes=32 if "_" in target else 64
    )
    found, labels = {}, set()
    for case in compile_cases(device):
        if target == "sm_75" and case.label.endswith("bf16"):
            continue  # Turing computes nothing in bfloat16
        assert case.label not in labels, f"two compile cases are called {case.label!r}"
        labels.add(case.label)
        found.setdefault(repr((case.kernel.fn.__name__, case.signature, case.constexprs, case.options)), case)
    return {case.label: case for case in found.values()}


def enough(target: str, model: str) -> list[str]:
    """Labels of cases of a model in which each kernel meets every dtype, constant and option that a launch can choose.

    Few of them meet all; which ones changes from target to target, so that most combinations are met somewhere.
    """
    met_by = {
        label: {(case.kernel.fn.__name__, *choice) for part in case[2:] for choice in part.items()}
        for label, case in cases(target).items()
        if model in label
    }
    labels = list(met_by)
    first = list(SHARED_MEMORY).index(target) * len(labels) // len(SHARED_MEMORY)
    labels = labels[first:] + labels[:first]
    chosen, missing = list[str](), set[Any]().union(*met_by.values())
    while missing:
        chosen.append(max(labels, key=lambda label: len(met_by[label] & missing)))
        missing -= met_by[chosen[-1]]
    return chosen


def compile_all(work: Iterable[tuple[str, str]]) -> Iterator[Compiled]:
    """Compile (target, label) pairs on all cores; Triton's cache on disk makes a second time cheap."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_one, *zip(*work, strict=True), chunksize=4)


def compile_one(target: str, label: str) -> Compiled:
    import triton
    from triton.compiler import ASTSource

    triton.knobs.compilation.disable_line_info = True  # a quarter of the time, for debuggers that nobody attaches
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
        spilled = _spilled_amd(compiled.asm["amdgcn"]) if "gfx" in target else _spilled_nvidia(compiled.asm["cubin"])
    except Exception as error:  # the compiler's failure is the result
        return Compiled(target, name, label, error=f"{type(error).__name__}: {error}")
    return Compiled(target, name, label, compiled.metadata.shared, spilled)


def _spilled_nvidia(cubin: bytes) -> int:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def _spilled_amd(assembly: str) -> int:
    """Scalar registers spill into vector registers, which costs no memory and does not count."""
    return sum(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s*(\d+)", assembly))
