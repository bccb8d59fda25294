"""``mini-infer learn`` from beginning to end, in a folder of the reader's own."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import mini_infer.cli
from mini_infer.cli import app
from tests.cli.test_cli import run
from tutorials import learn

NAME = "03_paging"
ANSWER = Path("learn", f"{NAME}.py")
CHECKS = '''
def test_sums(answer, explain):
    """small sums · 小的和"""
    explain("Two numbers are added.", "两个数相加。")
    got = answer.add(1, 2)
    assert got == 3, f"got {got}, expected 3 · 得到 {got}，应为 3"

def test_negative(answer, explain):
    explain("Negative numbers are added, too.", "负数也能相加。")
    assert answer.add(-1, -2) == -3
'''
SOURCE = '''def add(a, b):
    """Add. · 相加。"""
    # hole
    return a + b
    # end
'''
SKELETON = 'def add(a, b):\n    """Add."""\n    ...\n'
SOLUTION = 'def add(a, b):\n    """Add."""\n    return a + b\n'


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["learn", *arguments])


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and English as the locale."""
    monkeypatch.chdir(tmp_path)
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_GB.UTF-8")
    return tmp_path


@pytest.fixture
def course(reader: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of two small chapters, graded as the real one is."""
    course = reader / "checkout" / "tutorials"
    for name, title in (("01_first", "First"), (NAME, "Paging")):
        chapter = course / name
        chapter.mkdir(parents=True)
        (chapter / "checks.py").write_text(CHECKS, encoding="utf-8")
        (chapter / "solution.py").write_text(SOURCE, encoding="utf-8")
        for language, heading in (("en", title), ("zh", "分页")):
            (chapter / f"{language}.md").write_text(f"# 3. {heading}\n", encoding="utf-8")
    (course / "conftest.py").write_text((learn.COURSE / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(learn, "COURSE", course)
    monkeypatch.setattr(learn, "ROOT", course.parent)
    return course


def write(source: str) -> None:
    ANSWER.parent.mkdir(exist_ok=True)
    ANSWER.write_text(source, encoding="utf-8")


def test_a_reader_works_through_a_chapter(course: Path) -> None:
    listed = ask()
    assert listed.exit_code == 0 and "not begun" in listed.output and "mini-infer learn start 1" in listed.output

    started = ask("start", "3")
    assert started.exit_code == 0 and str(ANSWER) in started.output and "check 3" in started.output
    assert ANSWER.read_text(encoding="utf-8") == SKELETON
    assert "begun" in ask().output

    checked = ask("check", "3")
    assert checked.exit_code == 1
    assert "✗ small sums" in checked.output and "Two numbers are added." in checked.output
    assert "    got None, expected 3 " in checked.output
    assert f"still a ... to fill in: {ANSWER}:3" in checked.output

    write("def add(a, b):\n    print('adding', a)\n    return abs(a) + b\n")
    checked = ask("check", "3")
    assert checked.exit_code == 1
    assert "✓ small sums" in checked.output and "✗ negative" in checked.output
    assert "Negative numbers" in checked.output and "Two numbers" not in checked.output
    assert "-1 == -3" in checked.output and "adding -1" in checked.output

    write(SOLUTION)
    checked = ask("check", "3")
    assert checked.exit_code == 0 and "✓ negative" in checked.output and "All 2 checks pass" in checked.output
    assert "passed on 20" in ask().output


def test_the_reader_of_chinese(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert "未开始" in ask().output and "分页" in ask().output
    assert ask("start", NAME).exit_code == 0
    checked = ask("check", "3").output
    assert "✗ 小的和" in checked and "两个数相加。" in checked and "下一步：" in checked
    assert "    得到 None，应为 3 " in checked and "Two numbers" not in checked and "expected" not in checked
    assert "Two numbers" in ask("check", "3", "--lang", "en").output
    assert "Two numbers" in ask("--lang", "en", "check", "3").output
    monkeypatch.setenv("LC_ALL", "C")
    assert "not begun" in ask().output


def test_an_answer_is_never_overwritten(course: Path) -> None:
    write("mine = 1\n")
    refused = ask("start", "3")
    assert refused.exit_code == 1 and "left as it is" in refused.output
    assert ANSWER.read_text(encoding="utf-8") == "mine = 1\n"
    assert ask("start", "3", "--force").exit_code == 0
    assert ANSWER.read_text(encoding="utf-8") == SKELETON


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("def add(a, b)\n    return a\n", ["SyntaxError", f"{ANSWER}:1", "def add(a, b)", "cannot be loaded"]),
        ("import nothing_of_this_name\n", ["ModuleNotFoundError", f"{ANSWER}:1", "cannot be loaded"]),
        ("def add(a, b):\n    x = a\n    return x[0]\n", ["TypeError", f"{ANSWER}:3", "return x[0]", "Two numbers"]),
        ("def add(a, b):\n    exit(3)\n", ["SystemExit", f"{ANSWER}:2"]),
        ("import os\n\ndef add(a, b):\n    os._exit(3)\n", ["before they were done", "exit status 3"]),
        ("", ["AttributeError", "add", "could not call your"]),
        ("def add(a, b):\n    assert a, 'yes'\n    assert not b, 'a · b'\n", ["AssertionError: a · b", f"{ANSWER}:3"]),
        (
            "from mini_infer.memory import BlockManager\n\ndef add(a, b):\n    BlockManager(4, 4).free([a])\n",
            ["BlockError: block 1 is freed twice", f"{ANSWER}:4", "BlockManager(4, 4).free([a])"],
        ),
    ],
    ids=["syntax", "import", "exception", "exit", "the process is gone", "empty", "assertion", "inside the engine"],
)
def test_an_answer_that_breaks(course: Path, source: str, shown: list[str]) -> None:
    write(source)
    checked = ask("check", "3")
    assert checked.exit_code == 1 and "Traceback" not in checked.output
    for words in shown:
        assert words in checked.output, checked.output
    assert ("No line of your file raised this." in checked.output) == (source == "")


def test_an_error_that_no_line_of_the_answer_raised(course: Path) -> None:
    checks = course / NAME / "checks.py"
    checks.write_text(CHECKS.replace("got = ", "got = 2 * "), encoding="utf-8")
    write("def add(a, b):\n    pass\n")
    place = f"{checks}:5  got = 2 * answer.add(1, 2)\n"
    en, zh = ask("check", "3").output, ask("check", "3", "--lang", "zh").output
    assert "TypeError" in en and "No line of your file raised this." in en and place in en, en
    assert "TypeError" in zh and "报错的地方不在你的文件里" in zh and place in zh, zh
    assert f"{ANSWER}:" not in en + zh


def test_an_error_that_was_caused_by_another(course: Path) -> None:
    """As Triton's interpreter raises one of its own for what goes wrong in a kernel."""
    wrapped = "try:\n        got = answer.add(1, 2)\n    except TypeError as error:\n        raise OSError from error"
    checks = CHECKS.replace("got = answer.add(1, 2)", wrapped)
    (course / NAME / "checks.py").write_text(checks, encoding="utf-8")
    write("def add(a, b):\n    return a[0]\n")
    checked = ask("check", "3").output
    assert f"{ANSWER}:2  return a[0]\n" in checked and "No line of your file" not in checked, checked


def test_checks_that_cannot_be_run_here(course: Path) -> None:
    (course / NAME / "checks.py").write_text(f"import nothing_of_this_name\n{CHECKS}", encoding="utf-8")
    write(SOLUTION)
    refused = ask("check", "3")
    reason = "ModuleNotFoundError: No module named 'nothing_of_this_name'\n"
    assert refused.exit_code == 1 and refused.stderr == f"error: the checks of chapter 3 cannot be run here: {reason}"
    assert str(ANSWER) not in refused.stdout
    assert ask("check", "3", "--lang", "zh").stderr == f"错误：第 3 章的检查在这里无法运行：{reason}"


def test_an_answer_that_does_not_end(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "LIMIT", 4.0)
    write("def add(a, b):\n    while True:\n        pass\n")
    start = time.monotonic()
    checked = ask("check", "3", "--lang", "zh")
    assert checked.exit_code == 1 and "不会结束的循环" in checked.output and "两个数相加" in checked.output
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("garbage", ["", "[1, 2]", "{", '{"03_paging": 7, "x": null}', "\x00", '{"03_paging": "soon"}'])
def test_progress_that_cannot_be_read(course: Path, garbage: str) -> None:
    write(SOLUTION)
    learn.PROGRESS.write_text(garbage, encoding="utf-8")
    assert ask().exit_code == 0
    assert ask("check", "3").exit_code == 0
    assert list(json.loads(learn.PROGRESS.read_text(encoding="utf-8"))) == [NAME]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start", "99"], "there is no chapter '99'"),
        (["check", "paging"], "there is no chapter 'paging'"),
        (["solution", "-1"], ""),
        (["check", "3"], f"there is no {ANSWER}"),
        (["check", "3", "--lang", "fr"], "'fr'"),
        (["begin"], "begin"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_used_is_one_line(course: Path, arguments: Any, words: str) -> None:
    refused = ask(*arguments)
    assert refused.exit_code == 2 and words in refused.output
    assert refused.output.startswith("error: ") and refused.output.count("\n") == 1


def test_an_error_in_chinese_is_chinese_from_its_first_word(course: Path) -> None:
    assert ask("check", "99", "--lang", "zh").output == "错误：没有第 99 章；现有 1, 3\n"
    assert ask("--lang", "zh", "check", "3").output.startswith(f"错误：这里没有 {ANSWER}；")
    write(SOLUTION)
    assert ask("start", "3", "--lang", "zh").output.startswith(f"错误：{ANSWER} 已经存在")


def test_the_solution(course: Path) -> None:
    assert ask("solution", "3").output == SOLUTION
    assert ask("solution", "3", "--lang", "zh").output == SOLUTION.replace("Add.", "相加。")


def test_without_the_course(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_infer.cli, "CHECKOUT", reader)
    for arguments in ((), ("check", "3", "--lang", "zh"), ("--help",)):
        refused = ask(*arguments)
        assert refused.exit_code == 1 and refused.output.count("\n") == 1
        assert "clone the repository" in refused.output and "课程在代码仓库里" in refused.output


def test_without_pytest(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(SOLUTION)
    monkeypatch.setattr(learn.importlib.util, "find_spec", lambda name: None)
    refused = ask("check", "3")
    assert refused.exit_code == 1 and "pip install" in refused.output and refused.output.count("\n") == 1


def test_the_course_itself(reader: Path) -> None:
    """The real thing, as the installed command runs it."""
    listed = run("learn", cwd=reader)
    assert listed.returncode == 0 and "learn start" in listed.stdout
    number = str(learn._chapters()[0].number)
    assert run("learn", "start", number, "--lang", "zh", cwd=reader).returncode == 0
    checked = run("learn", "check", number, "--lang", "zh", cwd=reader)
    assert checked.returncode == 1 and "✗" in checked.stdout and "下一步" in checked.stdout, checked.stderr


def test_a_list_needs_no_torch(reader: Path) -> None:
    code = "import sys; from mini_infer.cli import app; app(['learn'], standalone_mode=False); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=learn.ROOT)
    assert done.stdout.split()[-1] == "False"
