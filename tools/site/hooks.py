"""What the site needs beyond MkDocs: pages from two folders, in the language of the build.

On the site a file is known by its path in the repository, such as docs/zh/kernels.md or tutorials/03_paging/en.md. So a
relative link that works in the repository works on the site, and MkDocs checks it; the address is chosen here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# The end of a line, which browsers show as a space, between two Chinese characters, tags aside.
CHINESE = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef“”]"
CHINESE_BREAK = re.compile(rf"({CHINESE}(?:</\w+>)*)\n(?=(?:<\w[^>]*>)*{CHINESE})")

_command = "build"


def on_startup(*, command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    global _command
    _command = command


def on_config(config: MkDocsConfig) -> None:
    """Put the chapters that there are in the place of `tutorials/*/en.md`."""
    config.nav = _expand(config.nav)


def _expand(nav: Any) -> Any:
    if isinstance(nav, dict):
        return {title: _expand(entry) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [_expand(found) for entry in nav for found in (_glob(entry) if isinstance(entry, str) else [entry])]
    return nav


def _glob(pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Replace what MkDocs found in docs/ by the files of the build's language, at their addresses."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path, address in _files(config.theme["language"]):
        file = File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=address)
        if address.endswith("tutorials/index.html"):
            file.name = "index"  # README.zh.md is its section's index, too
        files.append(file)


def _files(language: str) -> Iterator[tuple[str, str]]:
    """The site's files in a language: the path in the repository, and the address."""
    other, docs, suffix = ("en", "docs/zh", ".zh") if language == "zh" else ("zh", "docs", "")
    for page in (ROOT / docs).glob("*.md"):
        yield f"{docs}/{page.name}", "index.html" if page.stem == "index" else f"{page.stem}/index.html"
    for asset in (ROOT / "docs" / "assets").iterdir():
        if f".{other}." not in asset.name:
            yield f"docs/assets/{asset.name}", f"assets/{asset.name}"
    yield f"tutorials/README{suffix}.md", "tutorials/index.html"
    for folder in sorted((ROOT / "tutorials").glob("[01][0-9]_*")):
        chapter = f"tutorials/{folder.name}"
        if (folder / f"{language}.md").exists():
            yield f"{chapter}/{language}.md", f"{chapter}/index.html"
        for picture in folder.glob(f"*.{language}.svg"):
            yield f"{chapter}/{picture.name}", f"{chapter}/{picture.name}"


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Chapters come first in a search; a line that leads to the other language is left out, the header does so here."""
    if page.is_homepage:
        page.meta.setdefault("hide", ["navigation"])
    if page.file.src_uri.startswith("tutorials/"):
        page.meta.setdefault("search", {"boost": 3})
    return re.sub(r"^\[(中文|English)\]\(.*\)\n", "", markdown, flags=re.MULTILINE)


def on_page_content(html: str, *, config: MkDocsConfig, **_: object) -> str:
    """Open the listings of source, and put no spaces between Chinese characters."""
    html = html.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')
    if config.theme["language"] == "zh":
        parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
        html = "".join(part if part.startswith("<pre") else CHINESE_BREAK.sub(r"\1", part) for part in parts)
    return html


def on_post_build(*, config: MkDocsConfig) -> None:
    """Under `mkdocs serve` the English site brings the Chinese one along, so that the switch between them works."""
    if _command == "serve" and config.theme["language"] == "en":
        build(
            load_config(str(ROOT / "mkdocs.zh.yml"), site_dir=str(Path(config.site_dir) / "zh"), strict=config.strict)
        )
