"""Links within the repository lead somewhere, also in Markdown that is on no site."""

from pathlib import Path

import pytest

from .pages import ROOT, Page, read

FOLDERS = (".", ".github", "benchmarks", "docs", "examples", "mini_infer", "tests", "tools", "tutorials")
PAGES = [
    page
    for folder in FOLDERS
    for page in sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
    if not page.name.startswith("card.")  # their links hold where the model is exported to
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    page = read(path)
    dead = [
        f"{page.name}:{link.line}  {link.text}" for link in (*page.links, *page.pictures) if not alive(page, link.text)
    ]
    assert not dead, "dead links:\n" + "\n".join(dead)


def alive(page: Page, link: str) -> bool:
    path, anchor = page.resolve(link)
    if path is None:
        return True
    if not path.exists():
        return False
    return not anchor or path.suffix != ".md" or anchor in read(path).anchors or anchor in read(path).ids


@pytest.mark.parametrize("link", ["gone.md", "#gone", "page.md#gone"])
def test_a_dead_link_is_found(tmp_path: Path, link: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"# Here\n\n[x]({link}) [y](#here) [z](page.md#here)\n", encoding="utf-8")
    page = read(path)
    assert [found.text for found in page.links if not alive(page, found.text)] == [link]
