"""The course is whole: every chapter has its pages, pictures and exercise."""

import re

import pytest

from .pages import FOLDERS, TUTORIALS, read


def test_no_other_folders() -> None:
    assert sorted(path.name for path in TUTORIALS.glob("[01][0-9]_*")) == list(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
class TestChapter:
    def test_files(self, name: str) -> None:
        needed = [
            "en.md",
            "zh.md",
            "figures.py",
            "solution.py",
            "wrong.yaml",
            "checks.py",
        ]
        missing = [file for file in needed if not (TUTORIALS / name / file).exists()]
        assert not missing, f"tutorials/{name} lacks {', '.join(missing)}"

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_page(self, name: str, language: str) -> None:
        page = read(TUTORIALS / name / f"{language}.md")
        number = int(name[:2])
        assert page.headings[0].kind == "h1"
        assert re.match(rf"{number}\. ?\S", page.headings[0].text), page.headings[0]
        last = {"en": ["Where the engine does it", "Exercises"], "zh": ["引擎里在哪里", "练习"]}[language]
        assert [heading.text for heading in page.headings if heading.kind == "h2"][-2:] == last
        assert page.directives, "points at no line of the engine"
        assert any(block.kind == "python" for block in page.blocks)
        text = page.path.read_text(encoding="utf-8")
        assert f"mini-infer learn start {number}" in text
        assert f"mini-infer learn check {number}" in text

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_pictures(self, name: str, language: str) -> None:
        """Drawn in the page's language, in the repository, with text as text; none lies about unused."""
        page = read(TUTORIALS / name / f"{language}.md")
        shown = {picture.text for picture in page.pictures}
        drawn = {path.name for path in (TUTORIALS / name).glob(f"*.{language}.svg")}
        assert shown and shown == drawn
        for picture in drawn:
            svg = (TUTORIALS / name / picture).read_text(encoding="utf-8")
            assert "<text" in svg
            assert language == "en" or re.search("[\u4e00-\u9fff]", svg), f"{picture} has no Chinese in it"
