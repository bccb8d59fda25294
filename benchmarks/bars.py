"""Bar charts as SVG: text stays text, and the same figures always give the same file."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#1f77b4", "#ff7f0e", "#7f7f7f", "#009e73", "#cc79a7")
"""Of the series, in their order: colours of different lightness, which can be told apart by everyone."""

FONT = "system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
WIDTH, LEFT, RIGHT = 560, 16, 90
BAR, GAP, TITLE = 15, 14, 30


class Bar(NamedTuple):
    """One bar.

    Attributes:
        series: which colour it has.
        share: its length, 0 to 1 of the width that there is.
        label: the figure, written behind it.
    """

    series: int
    share: float
    label: str


class Group(NamedTuple):
    """Bars that are to be held against each other, below a line that says what they are about."""

    title: str
    bars: Sequence[Bar]


def chart(title: str, series: Sequence[str], groups: Sequence[Group]) -> str:
    """The SVG of a chart: title, legend, then the groups one below the other."""
    parts = [_text(LEFT, 28, title, size=16, weight=600)]
    left = LEFT
    for number, name in enumerate(series):
        parts.append(f'<rect x="{left}" y="42" width="12" height="12" fill="{COLOURS[number]}"/>')
        parts.append(_text(left + 18, 53, name))
        left += 46 + 9 * len(name.encode()) * 3 // 4
    top = 70
    for group in groups:
        parts.append(_text(LEFT, top + 16, group.title, weight=600))
        top += TITLE - 6
        for bar in group.bars:
            width = max(1.0, bar.share * (WIDTH - LEFT - RIGHT))
            parts.append(
                f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR - 2}" fill="{COLOURS[bar.series]}"/>'
            )
            parts.append(_text(LEFT + width + 6, top + 11, bar.label, size=12))
            top += BAR
        top += GAP
    size = f'viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}"'
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(left: float, base: int, text: str, *, size: int = 13, weight: int = 400) -> str:
    return (
        f'<text x="{left:.0f}" y="{base}" font-size="{size}" font-weight="{weight}" fill="#222">{escape(text)}</text>'
    )
