"""The picture of chapter 15: an automaton, and what a token of two characters walks along."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

LABELS = ("0-9", "0-9", "-", "0-9")


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"automaton": automaton(text)}


def automaton(text: Callable[[str, str], str]) -> Figure:
    """Five states in a row; above them a token that can be walked along, below one that cannot."""
    figure, axes = plt.subplots(figsize=(8, 2.8))
    axes.set_axis_off()
    axes.set_xlim(-0.8, 9.2)
    axes.set_ylim(-1.7, 1.8)
    axes.set_aspect("equal")
    for state in range(5):
        axes.add_patch(Circle((2 * state, 0), 0.4, facecolor="0.92", edgecolor="0.3"))
        axes.text(2 * state, 0, str(state), ha="center", va="center")
    axes.add_patch(Circle((8, 0), 0.48, fill=False, edgecolor="0.3"))
    axes.text(8, -0.95, text("may end", "可以结束"), ha="center", va="center", fontsize=9)
    for state, label in enumerate(LABELS):
        arrow(axes, 2 * state + 0.45, 2 * state + 1.5, 0, "0.3")
        axes.text(2 * state + 1, 0.15, label, ha="center", va="bottom", fontsize=9)
    walked = text("token “2-”, from state 1: may come", "词元“2-”，从状态 1 出发：可以出现")
    arrow(axes, 2, 6, 0.85, "tab:green")
    axes.text(4, 1.0, walked, ha="center", va="bottom", fontsize=9, color="tab:green")
    stuck = text("token “123”, from state 0: stuck at the 3", "词元“123”，从状态 0 出发：卡在 3")
    arrow(axes, 0, 4, -0.7, "tab:red")
    axes.text(2, -0.85, stuck, ha="center", va="top", fontsize=9, color="tab:red")
    return figure


def arrow(axes: Axes, left: float, right: float, height: float, colour: str) -> None:
    axes.annotate("", (right, height), (left, height), arrowprops={"arrowstyle": "->", "color": colour})
