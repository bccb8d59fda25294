"""A chapter's exercise, made of its solution: ``solution.py`` holds the answer, and what it says in both languages.

- A docstring or comment of one line is "English · 中文". A longer one is English, a line with ``---``, then Chinese.
- What stands between the lines ``# hole`` and ``# end`` is the reader's to write; in the skeleton it is ``...``. A line
  that ends in ``# hole`` is left out there.
"""

import ast
import io
import tokenize
from collections.abc import Iterator

LANGUAGES = ("en", "zh")
MARKS = ("# hole", "# end")


def skeleton(source: str, language: str) -> str:
    """What a reader begins with: the solution in one language, with its hole open."""
    kept, inside = [], False
    for line in _in_one_language(source, language):
        if line.strip() == "# hole":
            inside = True
            kept.append(line.replace("# hole", "..."))
        elif line.strip() == "# end":
            inside = False
        elif not inside and not line.endswith("# hole"):
            kept.append(line)
    return "\n".join(kept) + "\n"


def solution(source: str, language: str) -> str:
    """The solution in one language, without the marks of its hole."""
    lines = _in_one_language(source, language)
    kept = (line.removesuffix("  # hole") for line in lines if line.strip() not in MARKS)
    return "\n".join(kept) + "\n"


def _in_one_language(source: str, language: str) -> list[str]:
    lines = source.splitlines()
    texts = {first: (last, text) for first, last, text in (*_docstrings(source, lines), *_comments(source, lines))}
    kept, row = [], 0
    while row < len(lines):
        last, text = texts.get(row, (row, [lines[row]]))
        kept += _half(text, language)
        row = last + 1
    return kept


def _half(text: list[str], language: str) -> list[str]:
    """The lines of a docstring, of a comment, or of code with a comment behind it, in one language."""
    quotes = '"""' if text[0].lstrip().startswith('"""') else ""
    middle = next((row for row, line in enumerate(text) if line.strip() in ("---", "# ---")), None)
    if middle is not None and not quotes:
        return text[:middle] if language == "en" else text[middle + 1 :]
    if middle is not None:
        indent = text[-1].removesuffix(quotes)
        half = text[:middle]
        if language == "zh":
            half = [indent + quotes + text[middle + 1].removeprefix(indent), *text[middle + 2 : -1]]
        return [half[0] + quotes] if len(half) == 1 else [*half, text[-1]]
    if len(text) > 1 or " · " not in text[0]:
        return text
    english, chinese = text[0].rsplit(" · ", 1)
    if language == "en":
        return [english + quotes]
    mark = max(english.rfind('"""') + 3, english.rfind("# ") + 2)
    return [english[:mark] + chinese]


def _docstrings(source: str, lines: list[str]) -> Iterator[tuple[int, int, list[str]]]:
    """First row, last row and lines of each string that is a statement of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            yield first, last, lines[first : last + 1]


def _comments(source: str, lines: list[str]) -> Iterator[tuple[int, int, list[str]]]:
    """The same of each comment; rows that follow each other are one comment if ``# ---`` is among them."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    rows = [token.start[0] - 1 for token in tokens if token.type == tokenize.COMMENT]
    block: list[int] = []
    for row in [*rows, len(lines) + 1]:
        alone = row < len(lines) and lines[row].lstrip().startswith("#") and lines[row].strip() not in MARKS
        if block and (not alone or row != block[-1] + 1):
            text = lines[block[0] : block[-1] + 1]
            if any(line.strip() == "# ---" for line in text):
                yield block[0], block[-1], text
            else:
                yield from ((at, at, [lines[at]]) for at in block)
            block = []
        if alone:
            block.append(row)
        elif row < len(lines):
            yield row, row, [lines[row]]
