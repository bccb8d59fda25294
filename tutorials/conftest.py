"""Runs the course under pytest: the code of a page, and the checks of an exercise.

    pytest tutorials/03_paging/en.md
    pytest tutorials/03_paging/checks.py --answer learn/03_paging.py --lang zh

The blocks of a page run in order in one process: with pytest-xdist, take --dist loadfile.

A checks.py holds functions test_*, simplest first. Its docstring may name a check in both languages: "English · 中文".
They take fixtures: `answer`, `explain` and `parity`, described below. What an assertion says is in both languages, too:
what came, and what was expected.
"""

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LANGUAGES = ("en", "zh")
EXPLANATION, RECORD = pytest.StashKey[tuple[str, str]](), pytest.StashKey[Callable[..., None]]()

try:
    from tutorials.pages import SYBIL
except ImportError:
    pass  # grading needs no sybil
else:
    pytest_collect_file = SYBIL.pytest()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("course")
    group.addoption("--answer", metavar="FILE", help="the answer that checks.py grades")
    group.addoption("--lang", choices=LANGUAGES, default="en", help="the reader's language, for explanations")
    group.addoption("--record", metavar="FILE", help="write what happens, as one JSON object per line")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.answer:  # on a laptop, then; TRITON_INTERPRET=0 in the environment grades on a GPU
        os.environ.setdefault("TRITON_INTERPRET", "1")

    def write(**event: Any) -> None:
        if config.option.record:
            with open(config.option.record, "a", encoding="utf-8") as record:
                record.write(json.dumps(event, ensure_ascii=False) + "\n")

    config.stash[RECORD] = write


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A Chinese page has the code of its English twin, token by token (tests/docs/test_twins.py); so by default only
    that is run, unless somebody names the other."""
    for item in items:
        if item.path.name == "zh.md" and not any(argument.endswith("zh.md") for argument in config.args):
            item.add_marker(pytest.mark.slow)


# --- exercises -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def answer(request: pytest.FixtureRequest) -> ModuleType:
    """The reader's module."""
    if not request.config.option.answer:
        pytest.skip("--answer FILE says what to grade")
    path = _absolute(request.config.option.answer)
    spec = importlib.util.spec_from_file_location("answer", path)
    assert spec is not None and spec.loader is not None, f"{path} is not a Python file"
    sys.modules["answer"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _absolute(path: str) -> Path:
    """As the tracebacks of the answer name it."""
    return Path(path).absolute()


@pytest.fixture
def explain(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """explain(en, zh): if something fails from here on, this is what its reader is told."""

    def remember(en: str, zh: str) -> None:
        en, zh = (" ".join(text.split()) for text in (en, zh))
        request.node.stash[EXPLANATION] = (en, zh)
        request.config.stash[RECORD](event="explain", en=en, zh=zh)

    return remember


@pytest.fixture
def parity(request: pytest.FixtureRequest, answer: ModuleType, explain: Callable[[str, str], None]) -> Callable:
    """parity(op): the project's parity tests of an operation pass on the backend "mine", which the answer registers."""

    def run(op: str) -> None:
        from mini_infer import kernels

        if op not in kernels.OPS or "mine" not in kernels.available_backends(op):
            explain(
                f'No backend "mine" has {op}: is @register("{op}", backend="mine") above your function?',
                f'没有名为 mine 的后端实现了 {op}：函数上面写了 @register("{op}", backend="mine") 吗？',
            )
            raise AssertionError(f"{op} is not registered · {op} 没有注册")
        if EXPLANATION not in request.node.stash:
            explain(
                f"The project's own parity tests of {op}, over many shapes, strides and dtypes. The first that fails "
                "is below, with its case: try that one by hand.",
                f"这里运行的是项目自己的 {op} 一致性测试，覆盖多种形状、步长与数据类型。"
                "下面是第一个失败的用例，请先单独试它。",
            )
        tests = _ParityTests(op, lambda: request.config.stash[RECORD](event="alive"))
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "--kernel-backend", "mine"]
        options += ["-m", ""]  # interpreted, too, in every dtype
        pytest.main([str(ROOT / "tests" / "kernels"), f"--rootdir={ROOT}", *options], plugins=[tests])
        if tests.failure:
            pytest.fail(tests.failure, pytrace=False)
        if not tests.passed:
            raise RuntimeError(f"no parity test of {op} was run")

    return run


class _ParityTests:
    """A plugin: keep the tests of one operation, remember the first failure, call `alive` after each test."""

    def __init__(self, op: str, alive: Callable[[], None]) -> None:
        self.op, self.alive, self.passed, self.failure = op, alive, 0, ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marks = ((item, item.get_closest_marker("kernel")) for item in items)
        items[:] = [item for item, mark in marks if mark is not None and mark.args[0] == self.op]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        self.alive()
        if report.failed and not self.failure:
            self.failure = f"{report.nodeid}\n{report.longreprtext}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failure = report.longreprtext


# --- what a grader is told -------------------------------------------------------------------------


def _title(item: pytest.Item) -> tuple[str, str]:
    """A check's name in both languages: from its docstring, else from its function's name."""
    named = (getattr(getattr(item, "obj", None), "__doc__", None) or "").strip().split("\n")[0].rstrip(".")
    en, _, zh = (named or item.name.removeprefix("test_").replace("_", " ")).partition(" · ")
    return en, zh or en


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    en, zh = _title(item)
    item.config.stash[RECORD](event="start", en=en, zh=zh)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    write = item.config.stash[RECORD]
    if report.failed:
        texts = item.stash.get(EXPLANATION, None)
        if texts is not None:
            report.sections.insert(0, ("explanation", texts[LANGUAGES.index(item.config.option.lang)]))
        write(event="failed", phase=call.when, printed=report.capstdout, **_error(item, call.excinfo.value))
    elif report.when == "call":
        write(event="passed" if report.passed else "skipped")
    return report


def _error(item: pytest.Item, error: BaseException) -> dict[str, Any]:
    """What was raised, in short and in both languages, and where.

    `place` is the last line of the answer on the way there, if any. `ours` is the check's line, if the error is neither
    the answer's nor what the check found out: then it may be nobody's fault but ours.
    """
    answer, checks = str(_absolute(item.config.option.answer or "")), str(item.path)
    told = traceback.TracebackException.from_exception(error)
    found_out = isinstance(error, pytest.fail.Exception)
    en = zh = str(error) if found_out else f"{type(error).__name__}: {error}"
    if isinstance(error, AssertionError) and told.stack[-1].filename in (checks, __file__):
        found_out = True
        words = str(error).partition("\nassert ")[0]  # its own message, if it has one, and not also how it was computed
        en, _, zh = words.partition(" · ")
    if isinstance(error, SyntaxError) and error.filename == answer:
        en = zh = f"{type(error).__name__}: {error.msg}"
        place = [error.lineno, (error.text or "").strip()]
    else:
        place = _last_line(told, answer)
    ours = None if place or found_out else _last_line(told, checks)
    return {"en": en, "zh": zh or en, "place": place, "ours": ours}


def _last_line(told: traceback.TracebackException | None, file: str) -> list[Any] | None:
    """The innermost line of a file, also among what caused the error: Triton wraps what a kernel raises."""
    line = None
    while told is not None:
        for frame in told.stack:
            if frame.filename == file:
                line = [frame.lineno, frame.line]
        told = told.__cause__
    return line


def pytest_exception_interact(node: pytest.Item | pytest.Collector, call: pytest.CallInfo, report: Any) -> None:
    if isinstance(report, pytest.CollectReport):  # checks.py cannot be imported
        error = call.excinfo.value.__cause__ or call.excinfo.value
        node.config.stash[RECORD](event="unusable", error=f"{type(error).__name__}: {error}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK:
        session.config.stash[RECORD](event="finished")
