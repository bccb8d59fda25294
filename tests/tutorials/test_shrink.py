"""A smaller picture is the same picture: every shape where it was, every label, every style."""

import io
import re
from xml.etree import ElementTree

import pytest

from tutorials.shrink import shrink

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

NUMBER = re.compile(r"-?\d*\.?\d+")


@pytest.fixture(scope="module")
def drawn() -> str:
    """Lines, curves, markers, clipped bars, an image, rotated and mathematical labels."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure()
        left, right = figure.subplots(1, 2)
        left.plot([0, 0.001, 123.456], [1e-3, -7, 2], "o--", label="a · b")
        left.bar([1, 2], [-3, 4], color="#aabbcc")
        left.set_ylabel("turned")
        left.legend()
        right.imshow([[0, 1], [2, 3]])
        right.set_title("$10^{-3}$")
        out = io.StringIO()
        figure.savefig(out, format="svg")
    return out.getvalue()


def elements(svg: str, name: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}" + name)]


def test_shapes_stay_where_they_are(drawn: str) -> None:
    small = shrink(drawn)
    assert small.count("\n") == 1 and len(small) < len(drawn) / 2
    for name, attributes in {"path": ["d"], "use": ["x", "y"], "rect": ["x", "y", "width", "height"]}.items():
        before, after = elements(drawn, name), elements(small, name)
        assert len(before) == len(after) > 0
        for attribute in attributes:
            for old, new in zip(before, after, strict=True):
                there, now = (NUMBER.findall(element.get(attribute, "")) for element in (old, new))
                assert list(map(float, now)) == pytest.approx(list(map(float, there)), abs=0.051)


def test_labels_stay_as_they_are(drawn: str) -> None:
    for old, new in zip(elements(drawn, "text"), elements(shrink(drawn), "text"), strict=True):
        assert "".join("".join(old.itertext()).split()) == "".join("".join(new.itertext()).split())
        turns = [re.search(r"rotate\((\S+)", element.get("transform", "rotate(0 ")) for element in (old, new)]
        assert len({abs(float(turn.group(1))) for turn in turns if turn}) == 1


def test_what_is_referred_to_is_there(drawn: str) -> None:
    small = shrink(drawn)
    ids = re.findall(r' id="([^"]+)"', small)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="|url\()#([^")]+)', small)) == set(ids)


def test_styles_are_the_same(drawn: str) -> None:
    def said(style: str) -> set[tuple[str, ...]]:
        pairs = re.sub(r"#(.)\1(.)\2(.)\3\b", r"#\1\2\3", style).split(";")
        words = (tuple(re.sub(r"\s*,\s*", ",", part).strip() for part in pair.split(":")) for pair in pairs if pair)
        return {pair for pair in words if pair[0] != "font-family"}

    small = shrink(drawn)
    rules = dict(re.findall(r"\.(\w+)\{([^}]*)\}", small))
    before = [said(element.get("style", "")) for element in elements(drawn, "path") + elements(drawn, "text")]
    after = [
        said(rules.get(element.get("class", ""), "")) for element in elements(small, "path") + elements(small, "text")
    ]
    assert before == after
    assert small.count("font-family") < drawn.count("font-family") / 2
