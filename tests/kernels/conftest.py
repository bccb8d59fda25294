"""Every parity test names an operation and runs once on each backend that implements it on this machine's CPU."""

from collections.abc import Iterator

import pytest
import torch

from mini_infer import kernels


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param
