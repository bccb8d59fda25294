"""Objects out of a reader's file: which are found, and what is said of those that are not."""

from pathlib import Path

import pytest

from mini_infer.exceptions import InvalidConfigError, KernelError
from mini_infer.plugins import load_object, names_a_file

SOURCE = """from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True)
class Wanted:
    number: int = 7
"""


@pytest.mark.parametrize("text", ["a.py:Name", "/x/a.py:Name", "C:\\x\\a.py:Name", "目录/文件.py:名字"])
def test_a_file_and_a_name(text: str) -> None:
    assert names_a_file(text)


@pytest.mark.parametrize("text", ["fcfs", "triton", "", ":", "a.py:", ":Name", "a.py", "a.py:1x", "C:\\a.py"])
def test_what_is_no_file_and_name(text: str) -> None:
    assert not names_a_file(text)
    with pytest.raises(InvalidConfigError, match="is not FILE:NAME"):
        load_object(text)


def test_it_is_loaded_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_object("mine.py:Wanted")().number == 7
    assert load_object(f"{tmp_path / 'mine.py'}:Wanted")(number=8).number == 8


def test_an_edited_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    for number in (7, 8):  # within one tick of the file's clock, and of one length
        path.write_text(SOURCE.replace("7", str(number)), encoding="utf-8")
        assert load_object(f"{path}:Wanted")().number == number


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "Wanted", "there is no file"),
        (SOURCE, "Wnated", "defines no 'Wnated'; did you mean 'Wanted'?"),
        ("", "Wanted", "it has: no names at all"),
        ("def f(:", "Wanted", "raised SyntaxError"),
        ("1 / 0", "Wanted", "raised ZeroDivisionError: division by zero"),
        ("import missing_thing", "Wanted", "raised ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_loaded(source: str | None, name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source, encoding="utf-8")
    for error in (InvalidConfigError, KernelError):
        with pytest.raises(error) as caught:
            load_object(f"{path}:{name}", error)
        assert message in str(caught.value) and str(path) in str(caught.value)
