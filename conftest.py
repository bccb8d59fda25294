"""Two options for every test of this repository: which kernels to test, and whether to time instead of to test."""

from pathlib import Path

import pytest

from mini_infer.exceptions import KernelError
from mini_infer.kernels.registry import load_backend

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mini-infer")
    group.addoption(
        "--kernel-backend",
        action="append",
        default=[],
        metavar="[FILE:]NAME",
        help="test or time only this kernel backend; may be repeated. FILE is run first, and registers it: "
        "examples/my_rmsnorm.py:mine",
    )
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks instead of the tests, and report the kernels' speed",
    )


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options when it is configured
def pytest_configure(config: pytest.Config) -> None:
    config.option.kernel_backend = [_load(name) for name in config.option.kernel_backend]
    if config.option.benchmark:
        if not config.pluginmanager.hasplugin("benchmark"):
            raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install -e '.[dev]'")
        config.option.benchmark_only = True
        config.option.benchmark_quiet = True  # our report replaces its table
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args = [str(BENCHMARKS)]


def _load(name: str) -> str:
    """The bare name of a backend, whose file is run if it names one."""
    try:
        return load_backend(name)
    except KernelError as error:
        raise pytest.UsageError(f"--kernel-backend {name}: {error}") from error
