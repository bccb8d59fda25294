"""The pictures of the course can be drawn again, in both languages, and are the ones that are committed."""

import os
import re
from pathlib import Path

import pytest

pages = pytest.importorskip("tutorials.pages", reason="the course needs sybil")
pytest.importorskip("matplotlib")

COURSE = Path(pages.__file__).parent
CHAPTERS = sorted(figures.parent for figures in COURSE.glob("[01][0-9]_*/figures.py"))
LABEL = re.compile(r"<text[^>]*>([^<]*)")
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def words(svg: str) -> list[str]:
    """The labels that are words, without numbers: some pictures show what was measured."""
    return [re.sub(r"[\d.]+", "0", label) for label in LABEL.findall(svg) if re.search(r"[^\W\d_]", label)]


def draw(chapter: Path, folder: Path) -> None:
    """Runs in a process of its own."""
    import matplotlib
    import torch

    from tutorials.draw import LANGUAGES, save

    torch.set_num_threads(1)
    matplotlib.use("agg")
    os.chdir(folder)
    for language in LANGUAGES:
        save(chapter, language, folder)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_the_pictures_of_a_chapter(chapter: Path, tmp_path: Path) -> None:
    process = pages.processes().Process(target=draw, args=(chapter, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == 0, "its figures.py failed; python -m tutorials.draw shows how"
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn and drawn == sorted(path.name for path in chapter.glob("*.svg")), "draw them again and commit them"
    for name in drawn:
        there, anew = ((folder / name).read_text(encoding="utf-8") for folder in (chapter, tmp_path))
        labels = " ".join(LABEL.findall(there))
        assert bool(CHINESE.search(labels)) == name.endswith(".zh.svg"), f"{name} is not in its language: {labels}"
        assert words(there) == words(anew), f"{name} is stale: python -m tutorials.draw {chapter.name[:2]}"
        assert there.count("\n") == 1, f"{name} is larger than it need be"
