"""The picture of chapter 14: where a feed-forward layer's two matrices are cut, and what is added up."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLOURS = ("tab:blue", "tab:orange")


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"cut": cut(text)}


def cut(text: Callable[[str, str], str]) -> Figure:
    """U by rows, D by columns: each rank's features stay with it between the two."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    axes.set_axis_off()
    axes.set_xlim(0, 16)
    axes.set_ylim(0, 6.4)
    box(axes, 0.2, 2.75, 2, 0.7, "0.85", "x")
    for rank, (bottom, colour) in enumerate(zip((3.5, 0.6), COLOURS, strict=True)):
        middle = bottom + 1.05
        axes.annotate("", (3.1, middle), (2.3, 3.1), arrowprops={"arrowstyle": "->", "color": "0.4"})
        box(axes, 3.2, bottom, 2, 2.1, colour, text("rows of U", "U 的行"))
        axes.text(5.7, middle, "silu", ha="center", va="center", fontsize=9)
        box(axes, 6.2, middle - 0.35, 2.1, 0.7, colour, text("its features", "自己的特征"))
        box(axes, 8.9, bottom, 2.1, 2.1, colour, text("columns of D", "D 的列"))
        box(axes, 11.6, middle - 0.35, 1.7, 0.7, colour, text("a part", "一部分"))
        axes.annotate("", (14.0, 3.1), (13.4, middle), arrowprops={"arrowstyle": "->", "color": "0.4"})
        axes.text(3.2, bottom + 2.25, f"rank {rank}", color=colour, fontsize=10)
    axes.text(14.2, 3.1, "Σ", ha="center", va="center", fontsize=20)
    axes.text(14.75, 3.1, text("on both", "两边都有"), va="center", fontsize=9)
    return figure


def box(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str, label: str) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, alpha=0.35, edgecolor="0.3"))
    axes.text(left + width / 2, bottom + height / 2, label, ha="center", va="center", fontsize=9)
