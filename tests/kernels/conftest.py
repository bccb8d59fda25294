"""Every parity test names an operation and runs on each backend that has it, on each device of this machine.

`pytest tests/kernels --kernel-backend NAME` runs these tests, and only these, on backend NAME.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import kernels
from mini_infer.exceptions import KernelError

from . import truth
from .cases import INTERPRETED


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel(op): run the test on each backend that has the operation")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("kernel")
    if mark is not None:
        wanted = metafunc.config.option.kernel_backend
        choices = [
            (backend, device)
            for device in truth.DEVICES
            for backend in kernels.available_backends(*mark.args, device)
            if not wanted or backend in wanted
        ]
        metafunc.parametrize("backend", choices, ids="-".join, indirect=True)


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    deselected = {item for item in items if here in item.path.parents and not _concerns(config, item)}
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
    if INTERPRETED:
        _take_dtypes_in_turn([item for item in items if here in item.path.parents])


def _take_dtypes_in_turn(items: list[pytest.Item]) -> None:
    """Interpreted, a kernel takes a hundred times longer: a test meets each of its dtypes and each of its other
    parameters, but all of their pairs are for the slow tests."""
    tests: dict[Any, dict[str, dict[torch.dtype, pytest.Item]]] = {}
    for item in items:
        others = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if dtype := others.pop("dtype", None):
            tests.setdefault(item.function, {}).setdefault(str(others), {})[dtype] = item  # type: ignore[attr-defined]
    for cases in tests.values():
        for number, by_dtype in enumerate(cases.values()):
            turn = (number + number // len(by_dtype)) % len(by_dtype)  # others that repeat meet another one then
            for item in [*by_dtype.values()][:turn] + [*by_dtype.values()][turn + 1 :]:
                item.add_marker(pytest.mark.slow)


def _concerns(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether to run the test at all: skipping what a backend does not have would drown the result."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if config.option.kernel_backend and not isinstance(parameters.get("backend"), tuple):
        return False
    has_codes = "codes" in parameters or ("case" in parameters and parameters["case"].has_codes)
    if has_codes and not _knows_codes(*parameters["backend"]):
        return False
    if "case" in parameters:
        return parameters["case"].runs_on(parameters["backend"][1], parameters["dtype"])
    return True


@cache
def _knows_codes(backend: str, device: str) -> bool:
    """Whether a backend takes a KV cache of 8 bits, which it need not."""
    try:
        kernels.resolve(device, backend).check_codes()
    except KernelError:
        return False
    return True


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the backend under test runs."""
    return request.node.callspec.params["backend"][1]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend that every operation of `kernels` runs on; calls go through `truth.on_device`."""
    name, device = request.param
    for op in kernels.OPS:
        monkeypatch.setattr(kernels, op, truth.on_device(op, name, device))
    with kernels.use_backend(name):
        yield name
