"""Two options for every test of this repository: which kernels to test, and whether to time instead of to test."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from mini_infer import kernels

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mini-infer")
    group.addoption(
        "--kernel-backend",
        action="append",
        default=[],
        metavar="[MODULE:]NAME",
        help="test or time only this kernel backend; may be repeated. MODULE, a dotted name or a .py file, is imported "
        "first: examples/my_rmsnorm.py:mine",
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
    """Import the module that a backend's name may carry; returns the bare name."""
    module, _, backend = name.rpartition(":")
    try:
        if module.endswith(".py"):
            path = Path(module).resolve(strict=True)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[path.stem])
        elif module:
            importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise pytest.UsageError(f"--kernel-backend {name}: cannot import {module}: {error}") from error
    known = kernels.available_backends()
    if backend not in known:
        raise pytest.UsageError(f"--kernel-backend {name}: no backend {backend!r}; there are {', '.join(known)}")
    return backend
