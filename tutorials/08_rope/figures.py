"""The pictures of chapter 8: how fast each pair turns, and what that makes of the score at a distance."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from mini_infer.models.rope import Rope


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"frequencies": frequencies(text), "distance": distance(text)}


def frequencies(text: Callable[[str, str], str]) -> Figure:
    """The bundled model's pairs: the cosine of each one's angle at each distance."""
    angles = torch.outer(Rope(theta=10000.0).frequencies(32), torch.arange(129.0))
    figure, axes = plt.subplots()
    image = axes.imshow(
        angles.cos(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto", interpolation="nearest", rasterized=True
    )
    axes.set_xlabel(text("distance m − n, in tokens", "距离 m − n（词元）"))
    axes.set_ylabel(text("pair i", "第 i 对特征"))
    axes.set_yticks(range(0, 16, 3))
    axes.set_xticks(range(0, 129, 16))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ticks=[-1, 0, 1], pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(text("cosine of the angle", "角度的余弦"))
    return figure


def distance(text: Callable[[str, str], str]) -> Figure:
    """A key equal to the query: the mean over its pairs of the cosine of the angle between the two."""
    figure, axes = plt.subplots()
    away = torch.arange(1025.0)
    for theta, colour in ((10000.0, "tab:blue"), (500000.0, "tab:orange")):
        score = torch.outer(Rope(theta).frequencies(128), away).cos().mean(dim=0)
        axes.plot(away, score, color=colour, label=f"theta = {theta:,.0f}")
    axes.set_xlabel(text("distance m − n, in tokens", "距离 m − n（词元）"))
    axes.set_ylabel(text("score, as a share of that at distance 0", "分数，与距离为 0 时之比"))
    axes.set_xlim(0, 1024)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(0, 1025, 128))
    axes.legend(frameon=False)
    return figure
