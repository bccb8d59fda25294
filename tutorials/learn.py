"""``mini-infer learn``: the course's chapters, the reader's answers to their exercises, and what is wrong with them.

It also runs as ``python -m tutorials.learn``. Grading is pytest on a chapter's ``checks.py``, in a process of its own,
which writes down what happens as it goes: ``tutorials/conftest.py`` is the other half of this module.
"""

import ast
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from mini_infer.exceptions import InvalidRequestError, MiniInferError
from tutorials import exercises

COURSE = Path(__file__).parent
ROOT = COURSE.parent
FOLDER = Path("learn")
PROGRESS = FOLDER / "progress.json"
LIMIT = 60.0
"""Seconds that one check may take. Importing torch before the first may take five times as long."""
MOST_LINES = 16
"""Of an error message, or of what an answer printed."""


class Language(str, Enum):
    """Of the reader."""

    en = "en"
    zh = "zh"

    @classmethod
    def of(cls, wanted: "Language | None") -> "Language":
        """The one that was asked for, else the environment's."""
        names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
        locale = next(filter(None, names), "")
        return wanted or (cls.zh if locale.lower().startswith("zh") else cls.en)

    def text(self, en: str, zh: str) -> str:
        return zh if self is Language.zh else en


class CourseError(MiniInferError):
    """The course cannot be run here, or an answer would be lost."""

    def __init__(self, language: Language, en: str, zh: str) -> None:
        super().__init__(language.text(en, zh))
        self.label = language.text("error: ", "错误：")


class NoSuchExerciseError(CourseError, InvalidRequestError):
    """The reader named a chapter, or an answer, that is not there."""


@dataclass(frozen=True)
class Chapter:
    """A folder of the course, and the reader's file that goes with it."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name[:2])

    @property
    def answer(self) -> Path:
        return FOLDER / f"{self.folder.name}.py"

    def source(self) -> str:
        """What the exercise and its solution are made of."""
        return (self.folder / "solution.py").read_text(encoding="utf-8")

    def page(self, language: Language) -> Path:
        return self.folder / f"{language.value}.md"

    def title(self, language: Language) -> str:
        """The page's first heading, without the number."""
        try:
            heading = self.page(language).read_text(encoding="utf-8").lstrip().split("\n")[0]
        except OSError:
            return self.folder.name
        return re.sub(r"^#\s*(\d+\.\s*)?", "", heading).strip()


def list_chapters(console: Console, language: Language) -> None:
    """A table of the chapters and how far the reader is."""
    text, passed = language.text, _passed()
    table = Table(title=text("The course", "课程"), title_justify="left")
    table.add_column("#", justify="right")
    table.add_column(text("chapter", "章节"))
    table.add_column(text("exercise", "练习"), no_wrap=True)
    following = None
    for chapter in _chapters():
        date = passed.get(chapter.folder.name)
        if date:
            state = Text(text(f"passed on {date}", f"{date} 通过"), "green")
        elif chapter.answer.exists():
            state = Text(text("begun", "进行中"), "yellow")
        else:
            state = Text(text("not begun", "未开始"), "bright_black")
        if not date and (following is None or (chapter.answer.exists() and not following.answer.exists())):
            following = chapter
        table.add_row(str(chapter.number), Text(chapter.title(language)), state)
    console.print(table)
    if following is None:
        console.print(text("You have passed them all.", "全部通过。"))
    else:
        verb = "check" if following.answer.exists() else "start"
        _next(console, language, f"mini-infer learn {verb} {following.number}")


def start_exercise(console: Console, language: Language, wanted: str, force: bool) -> None:
    """Copy a chapter's skeleton to the reader's folder."""
    text, chapter = language.text, _chapter(wanted, language)
    if chapter.answer.exists() and not force:
        raise CourseError(
            language,
            f"{chapter.answer} exists and is left as it is; --force replaces it by a fresh skeleton",
            f"{chapter.answer} 已经存在，未作改动；加 --force 可用新的骨架覆盖它",
        )
    FOLDER.mkdir(exist_ok=True)
    chapter.answer.write_text(exercises.skeleton(chapter.source(), language.value), encoding="utf-8")
    console.print(f"[bold]{chapter.number}. {chapter.title(language)}[/bold]", highlight=False)
    _line(console, text("the chapter: ", "正文："), str(chapter.page(language)))
    _line(console, text("to fill in: ", "待填写："), str(chapter.answer))
    _next(console, language, f"mini-infer learn check {chapter.number}")


def show_solution(console: Console, language: Language, wanted: str) -> None:
    """Print a chapter's solution: as plain text unless somebody looks at it."""
    code = exercises.solution(_chapter(wanted, language).source(), language.value)
    if console.is_terminal:
        console.print(Syntax(code, "python", background_color="default", word_wrap=True))
    else:
        print(code, end="")


def check_answer(console: Console, language: Language, wanted: str) -> bool:
    """Grade the reader's answer, explain the first failure; whether all checks passed."""
    text, chapter = language.text, _chapter(wanted, language)
    if not chapter.answer.is_file():
        raise NoSuchExerciseError(
            language,
            f"there is no {chapter.answer} here; mini-infer learn start {chapter.number} makes it",
            f"这里没有 {chapter.answer}；先运行 mini-infer learn start {chapter.number}",
        )
    for module in ("pytest", "hypothesis"):
        if importlib.util.find_spec(module) is None:
            command = f"pip install -e '{ROOT}[dev]'"
            raise CourseError(language, f"grading needs {module}: {command}", f"批改需要 {module}：{command}")

    console.print(f"[bold]{chapter.number}. {chapter.title(language)}[/bold]", highlight=False)
    title, explanation, passed, failure = "", "", 0, None
    for event in _grade(chapter):
        match event["event"]:
            case "start":
                title, explanation = event[language.value], ""
            case "explain":
                explanation = event[language.value]
            case "passed":
                passed += 1
                console.print(Text.assemble(("  ✓ ", "green"), title))
            case "failed" | "timeout" | "broken":
                failure = event
            case "unusable":
                raise CourseError(
                    language,
                    f"the checks of chapter {chapter.number} cannot be run here: {event['error']}",
                    f"第 {chapter.number} 章的检查在这里无法运行：{event['error']}",
                )
    if failure is None:
        _save(chapter)
        console.print(text(f"All {passed} checks pass.", f"{passed} 项检查全部通过。"), style="green", highlight=False)
        console.print()
        _line(console, text("compare: ", "对照答案："), f"mini-infer learn solution {chapter.number}")
        following = next((other for other in _chapters() if other.number > chapter.number), None)
        if following is not None:
            _next(console, language, f"mini-infer learn start {following.number}")
        return True
    loaded = title and failure.get("phase") != "setup"
    console.print(Text.assemble(("  ✗ ", "red"), title if loaded else str(chapter.answer)))
    _explain(console, language, chapter, explanation, failure)
    return False


# --- what went wrong, for the reader ---------------------------------------------------------------


def _explain(console: Console, language: Language, chapter: Chapter, explanation: str, failure: dict[str, Any]) -> None:
    text = language.text
    if failure["event"] == "timeout":
        limit = f"{LIMIT:.0f}"
        stuck = text(
            f"Still not done after {limit} seconds, so it was stopped: is there a loop that does not end?",
            f"{limit} 秒后仍未结束，已停止：是不是有一个不会结束的循环？",
        )
        explanation = f"{stuck} {explanation}".strip()
    elif failure["event"] == "broken":
        explanation = text(
            f"The checks ended before they were done, with exit status {failure['status']}. The last words:",
            f"检查没有做完就结束了，退出码 {failure['status']}。最后的输出：",
        )
    elif failure.get("phase") == "setup":
        explanation = text("Your file cannot be loaded.", "你的文件无法载入。")
    console.print()
    console.print(Padding(Text(_wrapped(explanation, console.width - 8)), (0, 4)))
    console.print()
    _indented(console, failure.get(language.value, ""), "red")
    if failure.get("place"):
        _point(console, chapter.answer, *failure["place"])
    elif failure.get("ours"):
        whose = text(
            "No line of your file raised this. The check could not call your function, or could not use what it "
            "returned or changed; or the check itself is wrong, here:",
            "报错的地方不在你的文件里：可能是检查调用不了你的函数，或者用不了它返回或改动的内容，也可能是检查本身有错。"
            "出错的地方：",
        )
        console.print(Padding(Text(_wrapped(whose, console.width - 8)), (1, 4, 0, 4)))
        _point(console, chapter.folder / "checks.py", *failure["ours"])
    for line in _holes(chapter.answer):
        place = f"{chapter.answer}:{line}"
        hole = text(f"There is still a ... to fill in: {place}", f"还有 ... 没填：{place}")
        console.print(Padding(Text(hole, "cyan"), (0, 4)))
    if failure.get("printed"):
        console.print(Padding(text("Your code printed:", "你的代码输出："), (1, 4, 0, 4)))
        _indented(console, failure["printed"], "bright_black")
    console.print()
    _line(console, text("the chapter: ", "正文："), str(chapter.page(language)))
    _line(console, text("if stuck: ", "实在卡住："), f"mini-infer learn solution {chapter.number}")
    _next(
        console,
        language,
        text(
            f"edit {chapter.answer}, then mini-infer learn check {chapter.number}",
            f"修改 {chapter.answer}，再运行 mini-infer learn check {chapter.number}",
        ),
    )


_PIECE = re.compile(r"\s+|[（“《]*(?:[^\s\u2e80-\uffef（“《]+|[\u2e80-\uffef])[。，、；：？！）”》]*")
"""Spaces, a word, or a Chinese character, with the punctuation that must not be parted from it."""


def _wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` columns. Chinese may be broken anywhere, but not before a full stop."""
    lines = [""]
    for piece in _PIECE.findall(text):
        if cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        if lines[-1] or not piece.isspace():
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _point(console: Console, file: Path, line: int, source: str) -> None:
    console.print(Text.assemble("    ", (f"{file}:{line}", "cyan"), f"  {source}"), soft_wrap=True)


def _indented(console: Console, words: str, style: str) -> None:
    lines = words.rstrip().split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], "..."]
    if words.strip():
        console.print(Padding(Text("\n".join(lines), style), (0, 4)))


def _line(console: Console, name: str, value: str) -> None:
    """A path or a command, which stays in one piece for who copies it."""
    console.print(Text.assemble((name, "bold"), value), soft_wrap=True)


def _next(console: Console, language: Language, words: str) -> None:
    _line(console, language.text("next: ", "下一步："), words)


def _holes(answer: Path) -> list[int]:
    """The lines where a skeleton's `...` still stands."""
    try:
        tree = ast.parse(answer.read_bytes())
    except (SyntaxError, ValueError):
        return []
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr | ast.Assign | ast.Return)
        and isinstance(node.value, ast.Constant)
        and node.value.value is ...
    ]


# --- grading ---------------------------------------------------------------------------------------


def _grade(chapter: Chapter) -> Iterator[dict[str, Any]]:
    """Run the checks up to the first failure; what happens, as it happens."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "COLUMNS")}
    environment |= {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with tempfile.TemporaryDirectory(prefix="learn-") as folder:
        record, said = Path(folder, "record"), Path(folder, "said")
        record.touch()
        command = [sys.executable, "-m", "pytest", str(chapter.folder / "checks.py"), "-x", "-q", f"--rootdir={ROOT}"]
        command += ["-p", "no:cacheprovider", "--answer", str(chapter.answer.resolve())]
        command += ["--record", str(record)]
        with said.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,  # else a reader's tests/ or random.py would come before ours
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            done = yield from _follow(process, record)
        finally:
            _stop(process)
        if not done:
            lines = said.read_text(encoding="utf-8", errors="replace").strip().split("\n")
            words = "\n".join(lines[-MOST_LINES:])
            yield {"event": "broken", "status": process.returncode, "en": words, "zh": words}


def _follow(process: "subprocess.Popen[bytes]", record: Path) -> Generator[dict[str, Any], None, bool]:
    """The events of the record until the process ends or takes too long; whether they tell how it ended."""
    told, rest, deadline = False, "", time.monotonic() + 5 * LIMIT
    with record.open(encoding="utf-8") as file:
        while True:
            ended = process.poll() is not None  # asked first, so that the last lines are not missed
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                event = json.loads(line)
                told |= event["event"] in ("failed", "unusable", "finished")
                deadline = time.monotonic() + LIMIT
                yield event
            if ended:
                return told
            if time.monotonic() > deadline:
                yield {"event": "timeout"}
                return True
            time.sleep(0.05)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process, and what it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


# --- the course and the reader's progress ----------------------------------------------------------


def _chapters() -> list[Chapter]:
    return [Chapter(checks.parent) for checks in sorted(COURSE.glob("[01][0-9]_*/checks.py"))]


def _chapter(wanted: str, language: Language) -> Chapter:
    """The chapter of a number, or of its folder's name."""
    chapters = _chapters()
    for chapter in chapters:
        if wanted == chapter.folder.name or (wanted.isdecimal() and int(wanted) == chapter.number):
            return chapter
    numbers = ", ".join(str(chapter.number) for chapter in chapters)
    raise NoSuchExerciseError(
        language, f"there is no chapter {wanted!r}; there are {numbers}", f"没有第 {wanted} 章；现有 {numbers}"
    )


def _passed() -> dict[str, str]:
    """The day on which each exercise was passed. A file that cannot be understood counts as none."""
    try:
        known = json.loads(PROGRESS.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {name: date for name, date in known.items() if isinstance(date, str) and re.fullmatch(r"[\d-]{10}", date)}


def _save(chapter: Chapter) -> None:
    passed = _passed() | {chapter.folder.name: datetime.date.today().isoformat()}
    draft = PROGRESS.with_suffix(".new")
    draft.write_text(json.dumps(passed, indent=2) + "\n", encoding="utf-8")
    draft.replace(PROGRESS)


# --- the command line ------------------------------------------------------------------------------

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    epilog="mini-infer learn\n\nmini-infer learn start 7\n\nmini-infer learn check 7 --lang zh",
)

ChapterArgument = Annotated[
    str, typer.Argument(metavar="N", help="The chapter's number, or its folder's name.", show_default=False)
]
LanguageOption = Annotated[
    Language | None,
    typer.Option("--lang", help="Explain in this language; by default the locale's.", show_default=False),
]


@app.callback()
def learn_list(context: typer.Context, lang: LanguageOption = None) -> None:
    """Work through the course: list its chapters, begin an exercise, have the answer graded. · 学习课程并批改练习"""
    context.obj = lang
    if context.invoked_subcommand is None:
        list_chapters(Console(), Language.of(lang))


@app.command("start")
def learn_start(
    context: typer.Context,
    chapter: ChapterArgument,
    lang: LanguageOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the answer that is there.")] = False,
) -> None:
    """Put a chapter's skeleton into ./learn, with the hole to fill in."""
    start_exercise(Console(), Language.of(lang or context.obj), chapter, force)


@app.command("check")
def learn_check(context: typer.Context, chapter: ChapterArgument, lang: LanguageOption = None) -> None:
    """Grade the answer in ./learn and explain the first failure."""
    raise typer.Exit(0 if check_answer(Console(), Language.of(lang or context.obj), chapter) else 1)


@app.command("solution")
def learn_solution(context: typer.Context, chapter: ChapterArgument, lang: LanguageOption = None) -> None:
    """Print a chapter's solution."""
    show_solution(Console(), Language.of(lang or context.obj), chapter)


if __name__ == "__main__":
    app()
