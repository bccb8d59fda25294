"""What may be written to a terminal, and what a canvas looks like there."""

from collections.abc import Sequence

from rich.text import Text

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

MASK = "░"


def printable(text: str) -> str:
    """The text without control characters: a model must not move the cursor, nor change colours or the title."""
    return text.translate(_CONTROLS)


def draw_canvas(cells: Sequence[str | None], before: Sequence[str | None]) -> Text:
    """A canvas on one line, as far as it fits: a shaded cell for each mask; bold is what was a mask ``before``."""
    line = Text()
    for place, text in enumerate(cells):
        if text is None:
            line.append(MASK, "dim")
        else:
            is_new = place >= len(before) or before[place] is None
            line.append(printable(text).replace("\n", " "), "bold green" if is_new else "")
    return line
