"""The two languages say the same: headings, code, pictures, links and pieces of source, page by page."""

import difflib
import io
import itertools
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from .pages import ROOT, Page, Piece, neutral, read, twins

PAIRS = [pytest.param(english, chinese, id=english.relative_to(ROOT).as_posix()) for english, chinese in twins()]
WHOLE = [pair for pair in PAIRS if all(path.exists() for path in pair.values)]


def differ(english: Page, a: Piece | None, chinese: Page, b: Piece | None, what: str) -> str:
    places = [f"{page.name}:{piece.line}" if piece else page.name for page, piece in ((english, a), (chinese, b))]
    texts = [re.sub(r"\s+# .*", "", piece.text).rstrip() if piece else "(nothing)" for piece in (a, b)]
    if any("\n" in text for text in texts):
        shown = "\n".join(difflib.unified_diff(*(text.split("\n") for text in texts), *places, lineterm="", n=1))
    else:
        shown = "\n".join(f"  {place}  {text}" for place, text in zip(places, texts, strict=True))
    return f"{what} differ:\n{shown}"


def compare(english: Page, chinese: Page, kind: str, key) -> None:
    """The same pieces in the same order, by a key."""
    ours, theirs = getattr(english, kind), getattr(chinese, kind)
    for index in range(max(len(ours), len(theirs))):
        a = ours[index] if index < len(ours) else None
        b = theirs[index] if index < len(theirs) else None
        same = a is not None and b is not None and key(english, a) == key(chinese, b)
        assert same, differ(english, a, chinese, b, f"{kind} ({len(ours)} and {len(theirs)})")


def code(page: Page, block: Piece) -> object:
    """A block's language, and what it does: neither comments nor the letters in a drawing."""
    if block.kind == "text":
        return "text"
    if block.kind == "output":
        return "output", block.text.split()
    if block.kind == "python":
        ignored = (tokenize.COMMENT, tokenize.NL)
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(block.text).readline))
        except (tokenize.TokenError, SyntaxError):
            pass
        else:
            return "python", [(token.type, token.string) for token in tokens if token.type not in ignored]
    lines = (re.sub(r"(^|\s)#.*", "", line).split() for line in block.text.split("\n"))
    return block.kind, [line for line in lines if line]


def target(page: Page, link: Piece) -> tuple[str, str | int]:
    """Where a link leads, whatever the language: a heading is known by its place among the headings."""
    path, anchor = page.resolve(link.text)
    if path is None:
        return link.text, ""
    if anchor and path.suffix == ".md" and path.exists() and anchor in read(path).anchors:
        return neutral(path), read(path).anchors.index(anchor)
    return neutral(path), anchor


@pytest.mark.parametrize(("en", "zh"), PAIRS)
def test_both_exist(en: Path, zh: Path) -> None:
    assert en.exists() and zh.exists(), f"{en.relative_to(ROOT)} and {zh.relative_to(ROOT)} belong together"


@pytest.mark.parametrize(("en", "zh"), WHOLE)
class TestTwins:
    def test_headings(self, en: Path, zh: Path) -> None:
        compare(read(en), read(zh), "headings", lambda page, heading: heading.kind)

    def test_code(self, en: Path, zh: Path) -> None:
        compare(read(en), read(zh), "blocks", code)

    def test_pictures(self, en: Path, zh: Path) -> None:
        compare(read(en), read(zh), "pictures", lambda page, picture: target(page, picture))

    def test_source(self, en: Path, zh: Path) -> None:
        compare(read(en), read(zh), "directives", lambda page, directive: directive.text)

    def test_links(self, en: Path, zh: Path) -> None:
        """The same links between the same headings; within them a language may have its own order."""
        english, chinese = read(en), read(zh)
        for a, b in zip(sections(english), sections(chinese), strict=False):
            ours, theirs = Counter(target(english, link) for link in a), Counter(target(chinese, link) for link in b)
            extra = [(english, link) for link in a if target(english, link) in ours - theirs]
            extra += [(chinese, link) for link in b if target(chinese, link) in theirs - ours]
            shown = "\n".join(f"  {page.name}:{link.line}  {link.text}" for page, link in extra)
            assert ours == theirs, f"links differ:\n{shown}"


def sections(page: Page) -> list[list[Piece]]:
    """The links before the first heading, below the first, and so on."""
    starts = [0, *(heading.line for heading in page.headings), sys.maxsize]
    return [[link for link in page.links if start <= link.line < end] for start, end in itertools.pairwise(starts)]


# The comparison itself, so that a page cannot differ unnoticed.

PAGE = "# One\n\nText [a](b.md#c).\n\n```python\nx = 1  # why\n```\n\n![p](q.svg)\n\n::: a.b\n    options: c\n"


@pytest.mark.parametrize(
    ("change", "test"),
    [
        (("# One", "## One"), TestTwins.test_headings),
        (("x = 1", "x = 2"), TestTwins.test_code),
        (("```python", "```bash"), TestTwins.test_code),
        (("q.svg", "r.svg"), TestTwins.test_pictures),
        (("b.md", "d.md"), TestTwins.test_links),
        (("options: c", "options: d"), TestTwins.test_source),
    ],
    ids=["heading", "code", "language", "picture", "link", "source"],
)
def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, test) -> None:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    english, chinese = tmp_path / "en.md", tmp_path / "zh.md"
    english.write_text(PAGE, encoding="utf-8")
    chinese.write_text(PAGE.replace("why", "为什么").replace("One", "一"), encoding="utf-8")
    for same in (name for name in vars(TestTwins) if name.startswith("test_")):
        getattr(TestTwins, same)(None, english, chinese)
    other = tmp_path / "other.md"
    other.write_text(PAGE.replace(*change), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"other\.md:\d+"):
        test(None, english, other)
