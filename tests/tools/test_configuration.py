"""The configuration page: made of the code, complete in both languages, and up to date."""

from dataclasses import fields

import pytest

from tools.configuration import ALIASES, chinese, pages, tables


def test_the_pages_are_fresh() -> None:
    stale = [str(path) for path, content in pages().items() if path.read_text(encoding="utf-8") != content]
    assert not stale, f"{', '.join(stale)}: run `python -m tools.configuration`"


@pytest.mark.parametrize("cls", ALIASES)
def test_every_field_has_a_chinese_meaning(cls: type) -> None:
    meanings = chinese()[cls.__name__]
    assert list(meanings) == [field.name for field in fields(cls)]
    assert all(meaning and not meaning.endswith("。") for meaning in meanings.values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_field_is_there_once(language: str) -> None:
    made = tables(language)
    for cls in ALIASES:
        for field in fields(cls):
            assert made[cls.__name__].count(f"| `{field.name}` |") == 1
