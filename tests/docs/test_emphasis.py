"""Emphasis that Markdown does not take for one: between a full stop and a Chinese character nothing turns bold."""

from pathlib import Path

import pytest

from .pages import MARKDOWN, ROOT, twins


def leftovers(text: str) -> list[tuple[int, str]]:
    """Asterisks that would be shown to the reader: the line where their paragraph begins, and the words around them."""
    found = []
    for token in MARKDOWN.parse(text):
        for child in token.children or ():
            if child.type == "text" and "**" in child.content:
                assert token.map is not None
                found.append((token.map[0] + 1, child.content))
    return found


@pytest.mark.parametrize(
    "path",
    [page for pair in twins() for page in pair if page.exists()],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_asterisk_is_left_over(path: Path) -> None:
    found = leftovers(path.read_text(encoding="utf-8"))
    assert not found, "not bold; put a space behind it:\n" + "\n".join(f"{path}:{line}  {text}" for line, text in found)


def test_a_leftover_is_found() -> None:
    assert leftovers("x\n\n**因此。**然后") == [(3, "**因此。**然后")]
    assert leftovers("**因此。** 然后，`a ** b`，*强调*") == []
