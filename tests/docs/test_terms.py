"""One word per idea, in Chinese too: docs/terms.yaml."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.train_tutor.glossary import load_glossary

from .pages import ROOT, TUTORIALS, twins

TERMS: list[dict[str, Any]] = yaml.safe_load((ROOT / "docs" / "terms.yaml").read_text(encoding="utf-8"))
CODE = sorted(TUTORIALS.glob("[01][0-9]_*/**/*.py"))
GENERATED = ROOT / "docs" / "zh" / "glossary.md"  # in the words that the bundled model was taught


def avoided(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Words that the text should not use: line, word, and the term to use instead."""
    found = []
    for term in TERMS:
        for number, line in enumerate(text.split("\n"), start=1):
            for legitimate in term.get("but", ()):
                line = line.replace(legitimate, "")
            found += [(number, word, term) for word in term["not"] if word in line]
    return found


@pytest.mark.parametrize(
    "path",
    [*(chinese for _, chinese in twins() if chinese.exists() and chinese != GENERATED), *CODE],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_terms(path: Path) -> None:
    found = avoided(path.read_text(encoding="utf-8"))
    assert not found, "docs/terms.yaml has a word for it:\n" + "\n".join(
        f"{path.relative_to(ROOT)}:{line}  {word}: {term['zh']} ({term['en']})" for line, word, term in found
    )


def test_the_glossary_has_the_same_names() -> None:
    """The model may have been taught further names of a thing, but this one among them."""
    known = {term.en.term: term.zh for term in load_glossary().terms}
    for term in TERMS:
        if term["en"] in known:
            assert term.get("taught", term["zh"]) in known[term["en"]].names, term["en"]


def test_an_avoided_word_is_found() -> None:
    assert [word for _, word, _ in avoided("令牌，访问令牌\n操作系统的页表")] == ["令牌"]
