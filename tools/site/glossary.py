"""Writes the glossary's pages from what the bundled model learned: `python -m tools.site.glossary`."""

import re
from pathlib import Path

import yaml

from tools.train_tutor.glossary import GLOSSARY_FILE, LANGUAGES, Language

ROOT = Path(__file__).parents[2]
PAGES: dict[Language, Path] = {"en": ROOT / "docs" / "glossary.md", "zh": ROOT / "docs" / "zh" / "glossary.md"}
WORDS = {
    "en": {
        "title": "Glossary",
        "intro": "One word per idea: in the code, in these pages, and in what the bundled model was taught. This page "
        "and the model's training text have one source, `tools/train_tutor/glossary.yaml`. Each entry begins "
        "with the Chinese name.",
        "comparisons": "Easily confused",
        "and": " and ",
    },
    "zh": {
        "title": "术语表",
        "intro": "一个概念只用一个词：代码、文档如此，内置模型学到的也如此。本页与模型的训练文本出自同一份资料 "
        "`tools/train_tutor/glossary.yaml`。每条释义以英文名开头。例外有一个：其他页面所说的“算子”，内置模型学的是“内核”，"
        "本页照录。",
        "comparisons": "容易混淆的概念",
        "and": "与",
    },
}
GENERATED = "<!-- made by `python -m tools.site.glossary`; change tools/train_tutor/glossary.yaml instead -->"


def page(language: Language) -> str:
    """The glossary in a language, as Markdown."""
    data = yaml.safe_load(GLOSSARY_FILE.read_text(encoding="utf-8"))
    other: Language = "zh" if language == "en" else "en"
    words = WORDS[language]
    names = {term["id"]: term[language]["term"] for group in data["groups"] for term in group["terms"]}
    parts = [f"# {words['title']}", GENERATED, words["intro"]]
    for group in data["groups"]:
        parts.append(f"## {group[language]}")
        for term in group["terms"]:
            name, elsewhere = term[language]["term"], term[other]["term"]
            parts += [f"### {name}", (f"**{elsewhere}** · " if elsewhere != name else "") + term[language]["answer"]]
    parts.append(f"## {words['comparisons']}")
    for comparison in data["comparisons"]:
        compared = words["and"].join(names[term] for term in comparison["terms"])
        parts += [f"### {_spaced(compared)}", comparison[language]]
    return "\n\n".join(parts) + "\n"


def _spaced(text: str) -> str:
    """The same with a space wherever Chinese and Latin letters meet."""
    return re.sub(r"(?<=[!-~])(?=[一-鿿])|(?<=[一-鿿])(?=[!-~])", " ", text)


def main() -> None:
    for language in LANGUAGES:
        PAGES[language].write_text(page(language), encoding="utf-8")
        print(f"wrote {PAGES[language].relative_to(ROOT)}")


if __name__ == "__main__":
    main()
