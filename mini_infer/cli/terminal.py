"""What may be written to a terminal."""

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without control characters: a model must not move the cursor, nor change colours or the title."""
    return text.translate(_CONTROLS)
