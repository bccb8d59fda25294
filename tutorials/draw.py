"""Draws the pictures of the course: `python -m tutorials.draw` all of them, `python -m tutorials.draw 3` a chapter's.

A chapter's figures.py has `draw(text)`, where `text("English", "中文")` is the label in the language being drawn; it
returns figures by the stem of their files.
"""

import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tutorials.shrink import shrink

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # no machine has all the fonts below
warnings.filterwarnings("ignore", message="Glyph .* missing from font")

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
STYLE = {
    "figure.figsize": (7, 4),
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Text stays text, drawn with the first of these that the reader has. Here they say how much room it takes.
    "font.family": ["DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"],
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "mini-infer",  # the same picture is the same file
}


def chapters(numbers: list[str]) -> Iterator[Path]:
    """The chapters' folders, of all or of these."""
    for folder in sorted(HERE.glob("[01][0-9]_*")):
        if not numbers or folder.name[:2] in [number.zfill(2) for number in numbers]:
            yield folder


def figures(folder: Path, language: str) -> dict[str, Figure]:
    """What a chapter's figures.py draws in a language."""
    spec = importlib.util.spec_from_file_location(f"figures_{folder.name}", folder / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def text(en: str, zh: str) -> str:
        return zh if language == "zh" else en

    draw: Callable[[Callable[[str, str], str]], dict] = module.draw
    with matplotlib.rc_context(STYLE):
        return draw(text)


def save(folder: Path, language: str, to: Path) -> list[Path]:
    """Draw a chapter's pictures in a language into the folder `to`; returns the files."""
    import matplotlib.pyplot as plt

    files = []
    for stem, figure in figures(folder, language).items():
        drawn = io.StringIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(drawn, format="svg")
        plt.close(figure)
        files.append(to / f"{stem}.{language}.svg")
        files[-1].write_text(shrink(drawn.getvalue()), encoding="utf-8")
    return files


def main(numbers: list[str]) -> None:
    matplotlib.use("agg")
    for folder in chapters(numbers):
        for language in LANGUAGES:
            for file in save(folder, language, folder):
                print(file.relative_to(HERE.parent))


if __name__ == "__main__":
    main(sys.argv[1:])
