"""The rooms keep to their budget of lines, and every file is counted once."""

from pathlib import Path

import pytest

from tools.count import CORE_LINES, PACKAGE, PACKAGE_LINES, Lines, core, count, room_of, rooms

SOURCE = '''"""A module."""

X = 1
"""What X is."""


def f(a):
    """In two
    lines."""
    # why
    text = """not a
    docstring"""
    return a + X  # and why
'''


def test_lines_and_code() -> None:
    assert count(SOURCE) == Lines(total=13, code=5)
    assert count("") == Lines()


def test_every_file_is_in_one_room() -> None:
    files = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    assert sum(lines.total for lines in rooms().values()) == sum(len(file.splitlines()) for file in files)
    assert room_of("kernels/cpu/linear.py") == "cpu" and room_of("kernels/reference/norm.py").startswith("contract")
    assert room_of("config.py") == "plain data" and room_of("models/families/qwen3.py") == "models"
    with pytest.raises(LookupError, match="belongs to no room"):
        room_of("drawer/utils.py")


@pytest.mark.skip(reason="switched on once the floors below the engine are rebuilt")
def test_the_budget() -> None:
    found = rooms(Path(PACKAGE))
    assert core(found).total <= CORE_LINES
    assert sum(lines.total for lines in found.values()) <= PACKAGE_LINES
