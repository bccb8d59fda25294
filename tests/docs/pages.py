"""The project's Markdown, taken apart: what a page consists of, where its links lead, and which page is whose twin."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "tutorials"
FOLDERS = (
    "01_first_tokens",
    "02_kv_cache",
    "03_paging",
    "04_continuous_batching",
    "05_prefix_caching",
    "06_memory_pressure",
    "07_first_kernel",
    "08_rope",
    "09_paged_attention",
    "10_kernel_to_engine",
    "11_hiding_the_host",
    "12_serving",
    "13_quantization",
    "14_two_ranks",
    "15_grammars",
    "16_diffusion",
)
MARKDOWN = MarkdownIt("commonmark").enable("table")
EXTERNAL = re.compile(r"[a-z]+:")


@dataclass(frozen=True)
class Piece:
    """A heading, block, picture, link or directive of a page, and the line it is on."""

    line: int
    text: str
    kind: str = ""
    """A heading's level, a block's language."""


@dataclass(frozen=True)
class Page:
    path: Path
    headings: tuple[Piece, ...]
    blocks: tuple[Piece, ...]
    pictures: tuple[Piece, ...]
    links: tuple[Piece, ...]
    directives: tuple[Piece, ...]
    anchors: tuple[str, ...]
    """The headings' anchors, in order."""
    ids: frozenset[str]
    """Anchors given by hand."""

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def resolve(self, link: str) -> tuple[Path | None, str]:
        """The file in the repository that a link leads to (None: somewhere else), and the anchor in it."""
        target, _, anchor = link.partition("#")
        if EXTERNAL.match(link):
            return None, ""
        return (self.path.parent / target).resolve() if target else self.path, anchor


def twins() -> list[tuple[Path, Path]]:
    """Every English page and its Chinese twin, whether or not that exists."""
    top = [(ROOT / f"{name}.md", ROOT / f"{name}.zh.md") for name in ("README", "CONTRIBUTING", "tutorials/README")]
    docs = [(page, ROOT / "docs" / "zh" / page.name) for page in sorted((ROOT / "docs").glob("*.md"))]
    chapters = [(page, page.with_name("zh.md")) for page in sorted(TUTORIALS.glob("[01][0-9]_*/en.md"))]
    return top + docs + chapters


def neutral(path: Path) -> str:
    """A file's path in the repository, the same for both languages."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
    name = re.sub(r"^docs/zh/", "docs/", name)
    name = re.sub(r"^(tutorials/.*)/zh\.md$", r"\1/en.md", name)
    return re.sub(r"\.(en|zh)\.(md|py|svg|png)$", r".\2", name)


@cache
def read(path: Path) -> Page:
    found: dict[str, list[Piece]] = {name: [] for name in ("headings", "blocks", "pictures", "links")}
    anchors: list[str] = []
    text = path.read_text(encoding="utf-8")
    lines = _undo_indents(text.split("\n"))
    tokens = MARKDOWN.parse("\n".join(lines))
    line = 1
    for index, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else line
        if token.type == "heading_open":
            title = _plain(tokens[index + 1])
            found["headings"].append(Piece(line, title, token.tag))
            anchors.append(slug(title))
        elif token.type == "fence":
            language = (token.info.split() or ["text"])[0]
            found["blocks"].append(Piece(line, token.content, language))
        for child in token.children or ():
            if child.type == "image":
                found["pictures"].append(Piece(line, str(child.attrs["src"])))
            elif child.type == "link_open" and not str(child.attrs["href"]).startswith("mailto:"):
                found["links"].append(Piece(line, unquote(str(child.attrs["href"]))))
            line += child.type in ("softbreak", "hardbreak")
    return Page(
        path=path,
        directives=tuple(_directives(lines)),
        anchors=tuple(f"{a}_{anchors[:i].count(a)}" if a in anchors[:i] else a for i, a in enumerate(anchors)),
        ids=frozenset(re.findall(r"""\bid=["']([^"']+)""", text)),
        **{name: tuple(pieces) for name, pieces in found.items()},
    )


def slug(title: str) -> str:
    """The anchor of a heading, on the site as on the usual hosts of repositories."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.strip().lower()))


def _plain(inline: Token) -> str:
    return "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))


def _undo_indents(lines: list[str]) -> list[str]:
    """The bodies of admonitions and tabs, which Markdown alone takes for listings, moved to the margin."""
    undone, inside = [], False
    for line in lines:
        if re.match(r"(!!!|\?\?\?\+?|===) ", line):
            inside, line = True, ""
        elif inside and line.strip() and not line.startswith("    "):
            inside = False
        undone.append(line.removeprefix("    ") if inside else line)
    return undone


def _directives(lines: list[str]) -> list[Piece]:
    """`::: some.name` with the indented lines below it."""
    found: list[Piece] = []
    fenced = inside = False
    for number, line in enumerate(lines, start=1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and line.startswith("::: "):
            found.append(Piece(number, line))
            inside = True
        elif inside and line.startswith("    "):
            found[-1] = Piece(found[-1].line, f"{found[-1].text}\n{line}")
        else:
            inside = False
    return found
