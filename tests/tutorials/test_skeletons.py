"""Skeletons and solutions are made of one file: each in one language, with the hole open or filled."""

import ast
import re
from pathlib import Path

import pytest

from tutorials.exercises import LANGUAGES, skeleton, solution

COURSE = Path(__file__).parents[2] / "tutorials"
CHAPTERS = sorted(path.parent for path in COURSE.glob("[01][0-9]_*/checks.py"))
CHINESE = re.compile("[\u4e00-\u9fff]")

SOURCE = '''"""Title. · 标题。"""


@wrap  # hole
def f(a, b):
    """Long.

    Math: a · b.
    ---
    很长。

    算式：a · b。
    """
    x = "a · b"  # set it · 设好它
    # Two lines,
    # in English.
    # ---
    # 一行中文。
    # hole
    y = x  # plain

    return y
    # end


# One. · 一。
# Two. · 二。
def g(): ...  # fmt: skip
'''

ENGLISH = '''"""Title."""


def f(a, b):
    """Long.

    Math: a · b.
    """
    x = "a · b"  # set it
    # Two lines,
    # in English.
    ...


# One.
# Two.
def g(): ...  # fmt: skip
'''

SOLVED = '''"""标题。"""


@wrap
def f(a, b):
    """很长。

    算式：a · b。
    """
    x = "a · b"  # 设好它
    # 一行中文。
    y = x  # plain

    return y


# 一。
# 二。
def g(): ...  # fmt: skip
'''


def test_a_small_one() -> None:
    assert skeleton(SOURCE, "en") == ENGLISH
    assert solution(SOURCE, "zh") == SOLVED


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_each_is_in_one_language(chapter: Path) -> None:
    source = (chapter / "solution.py").read_text(encoding="utf-8")
    for made in (skeleton, solution):
        english, chinese = (made(source, language) for language in LANGUAGES)
        assert not CHINESE.search(english)
        for said in re.findall(r'"""(.*?)"""', chinese, re.DOTALL) + re.findall(r"# (.*)", chinese):
            assert CHINESE.search(said) or not re.search(r"[A-Za-z]{3,} [a-z]{3,} [a-z]{3,}", said), said
        assert code(english) == code(chinese)
    assert "..." in code(skeleton(source, "en"))
    assert "hole" not in solution(source, "en")


def code(source: str) -> str:
    """Without comments and docstrings."""
    return ast.unparse(WithoutDocstrings().visit(ast.parse(source)))


class WithoutDocstrings(ast.NodeTransformer):
    """Of modules, functions, classes and attributes: every string that is a statement."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node
