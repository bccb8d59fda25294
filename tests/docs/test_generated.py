"""Pages that a command writes are as it would write them today."""

import pytest

from tools.site import glossary
from tools.train_tutor.glossary import LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_glossary_is_up_to_date(language: str) -> None:
    page = glossary.PAGES[language].read_text(encoding="utf-8")
    assert page == glossary.page(language), "out of date: run `python -m tools.site.glossary`"
