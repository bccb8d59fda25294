from pathlib import Path

import pytest
import torch

LONGEST = (
    "tutorials/test_exercises.py",
    "kernels/test_commands.py",
    "kernels/test_compiles.py",
    "kernels/test_gpu_suite.py",
    "engine/test_equality.py",
    "engine/test_beam_search.py",
    "engine/test_pressure.py",
    "executor/test_ranks.py",
    "kernels/test_cpu.py",
    "cli/test_generate.py",
    "benchmarks/test_hostile.py",
    "benchmarks/test_compare.py",
)
"""Files that take about a minute of a core or more, of which most have few tests."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that processes which share the files out end together."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tests' tensors are tiny; threads would only wait for each other."""
    torch.set_num_threads(1)
