"""The runner of pages: what it runs, and what it says when a page is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.outcomes import Skipped

sybil = pytest.importorskip("sybil", reason="the course needs sybil")
pages = pytest.importorskip("tutorials.pages")

Run = Callable[[str], list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a page; for each block "", or "skipped", or what is wrong."""

    def outcomes(text: str) -> list[str]:
        path = tmp_path / "en.md"
        path.write_text(text.replace("'''", "```"), encoding="utf-8")
        document = sybil.Sybil([pages.Blocks()], patterns=["*.md"]).parse(path)
        results = []
        for example in document.examples():
            try:
                example.evaluate()
                results.append("")
            except Skipped:
                results.append("skipped")
            except sybil.example.SybilFailure as error:
                results.append(error.result)
        pages.close(document.namespace)
        return results

    return outcomes


def test_blocks_share_names_and_a_folder(run: Run) -> None:
    page = """
'''python
from pathlib import Path
import os
x = 40
Path("note").write_text("from Python\\n")
'''
'''text
this is no code
'''
'''python
print(x + 2, "...", 0.123)
'''

'''output
42 ... 0.12...
'''
'''bash
cat note && ls README.md && echo "$TRITON_INTERPRET"
'''
'''output
from Python
README.md
1
'''
"""
    assert run(page) == [""] * 5


def test_a_kernel_can_be_written_in_a_page(run: Run) -> None:
    pytest.importorskip("triton")
    page = """
'''python
import torch, triton, triton.language as tl

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, i < n) * 2, i < n)

x = torch.ones(3)
double[(1,)](x, 3, BLOCK=4)
print(x)
'''
'''output
tensor([2., 2., 2.])
'''
"""
    assert run(page) == ["", ""]


def test_an_exception_is_shown_with_its_line_in_the_page(run: Run) -> None:
    failed, *others = run("# 1\n\n'''python\nprint('before')\n1 / 0\n'''\n'''python\nx = 1\n'''\n'''output\n1\n'''\n")
    assert "ZeroDivisionError" in failed and 'en.md", line 5' in failed and "before" in failed
    assert others == ["skipped", "skipped"], "what follows a failure would only fail because of it"


def test_other_output_is_shown_beside_what_the_page_says(run: Run) -> None:
    result = run("'''python\nprint(2)\n'''\n'''output\n3\n'''\n")[1]
    assert "says:\n3" in result and "printed:\n2" in result


def test_output_must_follow_its_block(run: Run) -> None:
    assert "directly follow" in run("'''python\nprint(2)\n'''\nA word.\n\n'''output\n2\n'''\n")[1]


def test_a_command_that_fails(run: Run) -> None:
    result = run("'''bash\necho begun\nls nowhere | cat\necho more\n'''\n")[0]
    assert "exit status 2" in result and "nowhere" in result and "begun" in result and "more" not in result


def test_a_page_that_ends_its_process(run: Run) -> None:
    assert "ended, with status 3" in run("'''python\nimport os; os._exit(3)\n'''\n")[0]


def test_another_language(run: Run) -> None:
    assert "no others" in run("'''ruby\nputs 1\n'''\n")[0]
