"""Every operation, compiled, against the reference in float64: the table of the tests, at real sizes."""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.gpu_suite.figure import Context, Figure
from benchmarks.measure import DEVICE
from mini_infer import kernels
from tests.kernels.cases import CASES, FLOATS
from tests.kernels.parity import Mismatch, compare, poisoned_memory

Task = tuple[int, torch.dtype]
"""Which case of the table, in which dtype."""
Result = tuple[float | None, str]
"""The worst error as a share of what is tolerated, and the case; or None, and what is wrong."""


def parity(context: Context) -> Iterator[Figure]:
    """How many cases of each operation are right, and the worst error among them."""
    tasks = [
        (index, dtype)
        for index, case in enumerate(CASES)
        for dtype in FLOATS
        if case.size in context.sizes.parity and case.runs_on(DEVICE, dtype)
    ]
    huge = [task for task in tasks if CASES[task[0]].size == "huge"]
    others = [task for task in tasks if task not in huge]
    results: dict[str, list[Result]] = defaultdict(list)
    # Most of the time is compiling, on the host; but those that fill the GPU's memory go one by one.
    with ProcessPoolExecutor(min(6, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for (index, _), result in zip(others, pool.map(run_case, others), strict=True):
            results[CASES[index].op].append(result)
    for task in huge:
        results[CASES[task[0]].op].append(run_case(task))
    for op, those in results.items():
        wrong = [message for error, message in those if error is None]
        right = [(error, label) for error, label in those if error is not None]
        details = {"worst_share_of_tolerance": max(right, default=None), "wrong": wrong}
        yield Figure(op, len(right), f"of {len(those)} cases right", len(those), details=details)


def run_case(task: Task) -> Result:
    """Compare on the backend that the suite is about."""
    case, dtype = CASES[task[0]], task[1]
    backend = "triton" if DEVICE == "cuda" else kernels.backend_of(case.op, DEVICE)
    label = f"{case} {str(dtype).removeprefix('torch.')}"
    try:
        with torch.inference_mode(), poisoned_memory(), kernels.use_backend(backend):
            return compare(case, DEVICE, dtype, f"{case.op} on backend {backend!r} ({DEVICE})"), label
    except Mismatch as mismatch:
        return None, str(mismatch)
    except Exception as error:  # a crash is as wrong as a number can be
        return None, f"{label}: {type(error).__name__}: {error}"
    finally:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
