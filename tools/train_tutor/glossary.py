"""The glossary as typed data; `glossary.yaml` holds the words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
GLOSSARY_FILE = Path(__file__).with_name("glossary.yaml")


@dataclass(frozen=True)
class Entry:
    """One term in one language."""

    term: str
    answer: str
    aliases: tuple[str, ...] = ()
    article: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.term, *self.aliases)

    def with_article(self, name: str) -> str:
        """The name as a sentence would use it; aliases go without an article, as people type."""
        return f"{self.article} {name}" if self.article and name == self.term else name


@dataclass(frozen=True)
class Term:
    id: str
    group: str
    en: Entry
    zh: Entry

    def entry(self, language: Language) -> Entry:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True)
class Comparison:
    """Two terms that are easy to confuse, and what sets them apart."""

    terms: tuple[Term, Term]
    en: str
    zh: str

    def answer(self, language: Language) -> str:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True)
class Glossary:
    terms: tuple[Term, ...]
    comparisons: tuple[Comparison, ...]


def load_glossary(path: Path = GLOSSARY_FILE) -> Glossary:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    terms = {
        term["id"]: Term(term["id"], group["id"], _entry(term["en"]), _entry(term["zh"]))
        for group in data["groups"]
        for term in group["terms"]
    }
    comparisons = tuple(
        Comparison((terms[first], terms[second]), comparison["en"], comparison["zh"])
        for comparison in data["comparisons"]
        for first, second in [comparison["terms"]]
    )
    return Glossary(tuple(terms.values()), comparisons)


def _entry(fields: dict) -> Entry:
    return Entry(
        term=fields["term"],
        answer=fields["answer"],
        aliases=tuple(fields.get("aliases", ())),
        article=fields.get("article", ""),
    )
