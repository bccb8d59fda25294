"""Measured numbers in the documentation: made of the results files, and up to date."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.gpu_suite.figure import Figure, untaken
from benchmarks.report import save
from benchmarks.tables import WORDS, charts, files, fill, gpu_tables, pages, tables


def test_pages_and_charts_are_fresh() -> None:
    stale = [
        path.name
        for path, content in files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    assert not stale, f"{', '.join(stale)}: run `python -m benchmarks.tables`"


@pytest.mark.parametrize("language", WORDS)
def test_every_table_stands_on_some_page(language: str) -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path, of in pages().items() if of == language)
    assert not [name for name in tables(language) if f"<!-- {name} -->" not in texts]


def test_the_languages_have_the_same_tables_and_words() -> None:
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    english, chinese = (tables(language) for language in ("en", "zh"))
    assert english.keys() == chinese.keys()
    for name, table in english.items():
        shape, twin = ([line.count("|") for line in text.splitlines()] for text in (table, chinese[name]))
        assert shape == twin, name


@pytest.mark.parametrize("language", WORDS)
def test_charts_are_svg(language: str) -> None:
    for name, svg in charts(language).items():
        assert ElementTree.fromstring(svg).tag.endswith("svg"), name


def test_markers_are_needed() -> None:
    assert fill("<!-- a -->\nold\n<!-- /a -->", "a", "new") == "<!-- a -->\n\nnew\n\n<!-- /a -->"
    with pytest.raises(ValueError, match="no pair of markers"):
        fill("nothing", "a", "new")


@pytest.mark.parametrize("language", WORDS)
def test_gpu_figures_come_when_there_are_some(language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tables.RESULTS", tmp_path)
    words = WORDS[language]
    assert gpu_tables(words) == words["no_gpu"]
    figures = [
        Figure("rmsnorm", 39123.4, "GB/s", bar=3655.0),
        Figure("waste", 0.02, "", bar=0.01, at_most=True),
        untaken("attention", "GB/s", "it did not run", bar=1.0),
        Figure("only told", 1.0, "s"),
    ]
    report = {"kernels": {"seconds": 1.0, "error": None, "figures": [figure.to_dict() for figure in figures]}}
    for name in ("gpu-a", "gpu-a-tiny"):  # the second is a rehearsal
        save(name, "python -m benchmarks.gpu_suite", report, tmp_path)
    lines = gpu_tables(words).splitlines()
    assert lines[2] == f"| `kernels` | rmsnorm | 39,123 GB/s | ≥ 3,655 | {words['pass']} |"
    assert lines[3].endswith(f"| 0.02 | ≤ 0.01 | {words['miss']} |")
    assert lines[4].endswith(f"| - | ≥ 1 | {words['untaken']} |")
    assert len([line for line in lines if line.startswith("|")]) == 5 and "gpu-a.json" in lines[-1]
