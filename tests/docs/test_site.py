"""The site as its readers get it: built strictly, and opened in a real Chromium."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser import Page, chromium

from .conftest import Site
from .pages import FOLDERS, ROOT

DOCS = sorted(page.stem for page in (ROOT / "docs").glob("*.md"))
CHAPTERS = [f"tutorials/{name}/" for name in FOLDERS]
ADDRESSES = ["" if name == "index" else f"{name}/" for name in DOCS] + ["tutorials/", *CHAPTERS]
ROOTS = {"en": "", "zh": "zh/"}
CHAPTER = "tutorials/09_paged_attention/"
SCHEME = "document.body.dataset.mdColorScheme"

# Elements that reach beyond the window and are not inside something that scrolls.
TOO_WIDE = """
$$("body *").filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && e.checkVisibility())
    .filter((e) => !e.closest(".md-typeset__scrollwrap, pre, .md-sidebar, .md-search, .md-nav, .md-tabs, .highlight"))
    .map((e) => e.outerHTML.slice(0, 80))
"""


@pytest.mark.parametrize("language", ROOTS)
def test_builds_without_a_warning(site: Site, language: str) -> None:
    assert not site.logs[language], site.logs[language]


def test_has_every_page_in_both_languages(site: Site) -> None:
    if any(site.logs.values()):
        pytest.skip("the site was not built")
    built = {path.parent.relative_to(site.folder) for path in site.folder.rglob("index.html")}
    assert built == {Path(root, address) for root in ROOTS.values() for address in ADDRESSES}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """visit(path, ...): open a page. None may complain, nor ask another host for anything."""
    pages: list[Page] = []

    def open_page(path: str, **window: Any) -> Page:
        pages.append(Page(browser, f"{address}/{path}", **window))
        return pages[-1]

    yield open_page
    assert pages[-1].console() == []
    asked = [url for url in pages[-1].requests() if url.startswith("http")]
    assert asked and all(url.startswith(address) for url in asked), asked


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("path", ADDRESSES)
def test_page(visit: Any, root: str, path: str) -> None:
    """On a phone: in its language, nothing wider than the window, every picture there."""
    page = visit(root + path, width=390)
    assert page.js("document.documentElement.lang") == ("zh" if root else "en")
    assert page.js("$$('article h1').length") == 1
    assert page.js("document.title.startsWith($('article h1').firstChild.textContent)"), page.js("document.title")
    page.wait("document.readyState === 'complete'")
    assert page.js("$$('article img').filter((i) => !(i.complete && i.naturalWidth > 0)).map((i) => i.src)") == []
    assert path not in CHAPTERS or page.js("$$('article img').length") > 0
    assert page.js("document.documentElement.scrollWidth") <= 390
    assert page.js(TOO_WIDE) == []


@pytest.mark.parametrize("path", ["", "kernels/", "tutorials/", CHAPTER])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_switch_keeps_the_page(visit: Any, address: str, path: str, width: int) -> None:
    page = visit(path, width=width)
    english = page.js("$('h1').textContent")
    page.click("a.twin[hreflang=zh]")
    page.wait("document.documentElement.lang === 'zh'")
    assert page.js("location.href") == f"{address}/zh/{path}"
    assert not path or page.js("$('h1').textContent") != english
    page.click("a.twin[hreflang=en]")
    page.wait("document.documentElement.lang === 'en'")
    assert page.js("location.href") == f"{address}/{path}"


@pytest.mark.parametrize(
    ("root", "words"),
    [("", "paged attention"), ("zh/", "分页注意力"), ("zh/", "分页"), ("zh/", "注意力")],
)
def test_search_finds_the_chapter(visit: Any, address: str, root: str, words: str) -> None:
    assert f"{address}/{root}{CHAPTER}" in search(visit(root), words)


@pytest.mark.parametrize(
    ("root", "words"), [("", "KV cache"), ("zh/", "KV 缓存"), ("zh/", "块表"), ("zh/", "前缀缓存")]
)
def test_search_finds_the_glossary(visit: Any, address: str, root: str, words: str) -> None:
    assert f"{address}/{root}glossary/" in search(visit(root), words)


def search(page: Page, words: str) -> list[str]:
    """The pages that a search finds."""
    page.js("$('[data-md-component=search-query]').focus()")
    page.press(words)
    page.wait("$$('.md-search-result__link').length > 0")
    return page.js("$$('.md-search-result__link').map((a) => a.href.split(/[?#]/)[0])")


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_light_and_dark(visit: Any, root: str) -> None:
    """As the system has it, until the reader chooses; the choice stays."""
    page = visit(root)
    page.wait(f"{SCHEME} === 'default'")
    page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.wait(f"{SCHEME} === 'slate'")
    dark = page.js("getComputedStyle(document.body).backgroundColor")
    page.click("form[data-md-component=palette] label:not([hidden])")
    page.wait(f"{SCHEME} === 'default'")
    assert page.js("getComputedStyle(document.body).backgroundColor") != dark
    page.driver.get(page.url + CHAPTER)
    page.wait(f"{SCHEME} === 'default'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_stand_on_white(visit: Any, scheme: str) -> None:
    page = visit(CHAPTER, scheme=scheme)
    page.wait(f"{SCHEME} === '{'slate' if scheme == 'dark' else 'default'}'")
    picture = "getComputedStyle($('article img')).backgroundColor"
    assert page.js(picture) == ("rgb(255, 255, 255)" if scheme == "dark" else "rgba(0, 0, 0, 0)")
