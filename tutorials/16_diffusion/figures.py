"""The picture of chapter 16: a canvas of four words after each pass."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PASSES = [("", "", "", ""), ("", "", "taste", ""), ("red", "", "taste", ""), ("red", "apples", "taste", ""),
          ("red", "apples", "taste", "sweet")]  # fmt: skip


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"canvas": canvas(text)}


def canvas(text: Callable[[str, str], str]) -> Figure:
    """A row for each pass; what was written in it stands out."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.set_axis_off()
    axes.set_xlim(-1.6, 4.1)
    axes.set_ylim(-len(PASSES) + 0.4, 0.7)
    before = PASSES[0]
    for row, words in enumerate(PASSES):
        label = text(f"after pass {row}", f"第 {row} 遍之后") if row else text("at first", "一开始")
        axes.text(-0.15, -row + 0.25, label, ha="right", va="center", fontsize=10)
        for place, word in enumerate(words):
            colour = "tab:green" if word and not before[place] else ("white" if word else "0.75")
            axes.add_patch(Rectangle((place, -row), 0.94, 0.5, facecolor=colour, edgecolor="0.3", alpha=0.8))
            axes.text(place + 0.47, -row + 0.25, word, ha="center", va="center")
        before = words
    return figure
