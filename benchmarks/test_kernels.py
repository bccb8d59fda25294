"""Every kernel on every backend that is fast here: ``pytest --benchmark``, or ``make bench``."""

import statistics
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernel_cases import Case, kernel_cases
from benchmarks.measure import DEVICE, Flush, now
from mini_infer import kernels

INTERPRETED = "triton" if DEVICE == "cpu" else None
CASES = list(kernel_cases())
OPS = list(dict.fromkeys(case.op for case in CASES))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        wanted = metafunc.config.option.kernel_backend
        pairs = [
            (case, backend)
            for case in CASES
            for backend in kernels.available_backends(case.op, DEVICE)
            # The reference is what a speedup is over.
            if backend != INTERPRETED and (not wanted or backend in wanted or backend == "reference")
        ]
        pairs = [
            pair for pair in pairs if not wanted or set(wanted) & set(kernels.available_backends(pair[0].op, DEVICE))
        ]
        metafunc.parametrize(("case", "backend"), pairs, ids=[f"{case.label}, {backend}" for case, backend in pairs])


@pytest.fixture(scope="module")
def flush() -> Flush:
    return Flush()


@pytest.mark.benchmark(timer=now)
def test_kernel(benchmark: BenchmarkFixture, flush: Flush, case: Case, backend: str) -> None:
    function = case.function or getattr(kernels, case.op)
    with kernels.use_backend(backend):  # which may want a cache or a weight in an order of its own
        # On a CPU the inputs take turns, so that a round does not find its own in the cache.
        inputs = [case.make() for _ in range(1 if DEVICE == "cuda" else 1 + min(7, (128 << 20) // case.bytes_moved))]
    turn = 0

    def prepare() -> tuple[tuple[()], dict[str, Any]]:
        nonlocal turn
        turn += 1
        flush()
        return (), inputs[turn % len(inputs)]

    with torch.inference_mode(), kernels.use_backend(backend):
        seconds = [_seconds(function, *prepare()) for _ in range(4)]  # the first compiles
        rounds = min(100, max(5, round(0.3 / max(statistics.median(seconds), 1e-6))))
        benchmark.extra_info.update(
            op=case.op,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            backend=backend,
            bytes=case.bytes_moved,
            flops=case.flops,
            compute=case.compute,
        )
        benchmark.pedantic(function, setup=prepare, rounds=rounds, warmup_rounds=2)


def _seconds(function: Any, arguments: tuple[()], named: dict[str, Any]) -> float:
    start: Any = now()
    function(*arguments, **named)
    return float(now() - start)
