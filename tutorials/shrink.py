"""Makes the pictures that Matplotlib draws small: the same shapes and labels in a fifth of the bytes, on one line."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from xml.etree import ElementTree

SVG, XLINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}"
NUMBER = re.compile(r"-?\d*\.?\d+(?:e-?\d+)?")
COLOR = re.compile(r"#([0-9a-f])\1([0-9a-f])\2([0-9a-f])\3(?![0-9a-f])")
COORDINATES = ("d", "x", "y", "width", "height", "transform", "points", "viewBox")


def shrink(svg: str) -> str:
    """The picture without metadata, with numbers to a tenth of a point, and each style and name said once."""
    root = ElementTree.fromstring(svg)
    _simplify(root)
    _name_shortly(root)
    _share_styles(root)
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _simplify(element: ElementTree.Element) -> None:
    """Round, and drop what says nothing: metadata, groups, turns by no angle, and the space between elements."""
    for name, value in list(element.attrib.items()):
        if name in COORDINATES:
            element.set(name, _path(value) if name == "d" else NUMBER.sub(_rounded, value))
        elif name.startswith(XLINK):
            element.set("href", "".join(element.attrib.pop(name).split()))
    if re.match(r"rotate\(-?0 ", element.get("transform", "")):
        del element.attrib["transform"]
    kept: list[ElementTree.Element] = []
    for child in element:
        if child.tag == f"{{{SVG}}}metadata":
            continue
        _simplify(child)
        if child.tag == f"{{{SVG}}}g":
            child.attrib.pop("id", None)
            kept += [child] if child.attrib else list(child)
        else:
            kept.append(child)
    element[:] = kept
    if not (element.text or "").strip():
        element.text = None
    for child in element:
        if not (child.tail or "").strip():
            child.tail = None


def _rounded(match: "re.Match[str]") -> str:
    number = float(match.group())
    number = round(number, 1 if abs(number) >= 10 else 2) + 0.0  # and no negative zero
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:g}")


def _path(d: str) -> str:
    """A path without spaces around its commands, and without the commands that are understood."""
    parts, last = [], ""
    for token in re.findall(rf"[A-Za-z]|{NUMBER.pattern}", d):
        if not token.isalpha():
            parts += [" " if parts and not parts[-1].isalpha() else "", NUMBER.sub(_rounded, token)]
        elif not (token == "L" and last in "ML" and parts):
            parts.append(token)
        last = token if token.isalpha() else last
    return "".join(parts)


def _name_shortly(root: ElementTree.Element) -> None:
    """Ids of one letter or two for what is referred to, and none for the rest."""
    used = set(re.findall(r"#([\w-]+)", " ".join(value for e in root.iter() for value in e.attrib.values())))
    ids = [element.get("id") for element in root.iter()]
    names = dict(zip((str(name) for name in ids if name in used), _fresh_names(), strict=False))
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in used:
            element.set("id", names[str(old)])
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, re.sub(r"(?<=#)[\w-]+", lambda match: names.get(match.group(), match.group()), value))


def _share_styles(root: ElementTree.Element) -> None:
    """A class for each style."""
    styles = {element: element.attrib.pop("style") for element in root.iter() if "style" in element.attrib}
    short = {style: COLOR.sub(r"#\1\2\3", re.sub(r"\s*([:;,])\s*", r"\1", style)) for style in styles.values()}
    classes = dict(zip(dict.fromkeys(short.values()), _fresh_names(), strict=False))
    for element, style in styles.items():
        element.set("class", classes[short[style]])
    sheet = root.find(f".//{{{SVG}}}style")
    assert sheet is not None, "Matplotlib writes a style sheet"
    sheet.attrib.clear()
    rules = "".join(f".{name}{{{style}}}" for style, name in classes.items())
    families = Counter(re.findall("font-family:[^;}]+;?", rules)).most_common(1)
    for family, _ in families:  # nearly all labels have the same: it is said of the whole picture
        rules = f"svg{{{family}}}" + rules.replace(family, "")
    sheet.text = (sheet.text or "") + rules


def _fresh_names() -> Iterator[str]:
    for length in itertools.count(1):
        for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=length):
            yield "".join(letters)
