"""Every exercise of the course: its skeleton fails, its solution passes, its wrong answers are told what is wrong.

A chapter's answers are graded once, each in a process of its own, and one grading gives the words of both languages.
"""

import ast
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutorials import exercises

pages = pytest.importorskip("tutorials.pages", reason="the course needs sybil")

COURSE = Path(pages.__file__).parent
CHAPTERS = sorted(checks.parent for checks in COURSE.glob("[01][0-9]_*/checks.py"))
LIMIT = 240  # seconds for one answer; they should take ten


def wrong_answers(chapter: Path) -> dict[str, dict[str, Any]]:
    """A chapter's wrong answers by name: the words that must be told of each, and what it replaces in the solution."""
    entries = yaml.safe_load((chapter / "wrong.yaml").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


def source(chapter: Path, answer: str) -> str:
    """The text of an answer: a skeleton, the solution, or the solution with a mistake."""
    text = (chapter / "solution.py").read_text(encoding="utf-8")
    if answer == "skeleton":
        return exercises.skeleton(text, "zh")  # in English it is the same code, see test_skeletons.py
    text = exercises.solution(text, "en")
    changes = [] if answer == "solution" else wrong_answers(chapter)[answer]["replace"]
    for change in changes:
        assert text.count(change["old"]) == 1, f"{answer}: the solution has this {text.count(change['old'])} times"
        text = text.replace(change["old"], change["new"])
    return text


def named(chapter: Path, *names: str) -> Any:
    """A test's parameters, with a readable id."""
    return pytest.param(chapter, *names, id=" ".join([chapter.name, *names]))


def grade(checks: str, answer: str, record: str) -> None:
    """Runs in a process of its own."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer to import than most answers to grade
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={pages.ROOT}"]
    raise SystemExit(pytest.main([checks, *options, "--answer", answer, "--record", record]))


@cache
def graded(chapter: Path) -> dict[str, list[dict[str, Any]]]:
    """What happened with each answer of a chapter."""
    context = pages.processes()

    def run(answer: str) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="graded-") as folder:
            record, file = Path(folder, "record"), Path(folder, f"{chapter.name}.py")
            record.touch()
            file.write_text(source(chapter, answer), encoding="utf-8")
            process = context.Process(target=grade, args=(str(chapter / "checks.py"), str(file), str(record)))
            process.start()
            process.join(LIMIT)
            assert process.exitcode is not None, f"grading {answer} is still not done after {LIMIT} s"
            return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]

    names = ["skeleton", "solution", *wrong_answers(chapter)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(run, names), strict=True))


def failure(events: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The failure, and the explanation that its reader sees, in both languages."""
    failed = [event for event in events if event["event"] == "failed"]
    assert failed, f"it passes: {[event['en'] for event in events if event['event'] == 'start']}"
    assert failed[0]["phase"] == "call", f"it cannot be loaded: {failed[0]['en']}"
    explanation = {"en": "", "zh": ""}
    for event in events:
        if event["event"] in ("start", "explain"):
            explanation = event if event["event"] == "explain" else {"en": "", "zh": ""}
    return failed[0], explanation


@pytest.mark.parametrize("chapter", [named(chapter) for chapter in CHAPTERS])
def test_a_skeleton_fails_and_is_explained(chapter: Path) -> None:
    _, explanation = failure(graded(chapter)["skeleton"])
    assert explanation["en"] and explanation["zh"], "nothing explains the first failure"


@pytest.mark.parametrize("chapter", [named(chapter) for chapter in CHAPTERS])
def test_the_solution_passes(chapter: Path) -> None:
    events = graded(chapter)["solution"]
    failed = [event["en"] for event in events if event["event"] == "failed"]
    assert not failed, failed[0]
    assert events and events[-1]["event"] == "finished"
    assert not [event for event in events if event["event"] == "skipped"], "a check was skipped"


@pytest.mark.parametrize("chapter", [named(chapter) for chapter in CHAPTERS])
def test_there_are_three_wrong_answers(chapter: Path) -> None:
    assert len(wrong_answers(chapter)) >= 3


@pytest.mark.parametrize(
    "chapter, answer",
    [named(chapter, name) for chapter in CHAPTERS for name in wrong_answers(chapter)],
)
def test_a_wrong_answer_is_told_its_mistake(chapter: Path, answer: str) -> None:
    hint = wrong_answers(chapter)[answer]["hint"]
    failed, explanation = failure(graded(chapter)[answer])
    for language in ("en", "zh"):
        told = " ".join(explanation[language].lower().split())
        assert hint[language].lower() in told, f"told: {explanation[language]}\nbecause: {failed[language]}"
    assert failed["place"] or failed["ours"] is None, f"it seems to be the fault of {failed['ours']}: {failed['en']}"


@pytest.mark.parametrize("chapter", [named(chapter) for chapter in CHAPTERS])
def test_a_check_says_in_both_languages_what_came(chapter: Path) -> None:
    for node in ast.walk(ast.parse((chapter / "checks.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            parts = ast.walk(node.msg) if node.msg else ()
            words = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
            en, _, zh = words.partition(" · ")
            told = re.search("expected|engine|returned None", en) and re.search("[\u4e00-\u9fff]", zh)
            assert told, f"{chapter.name}/checks.py:{node.lineno}: {words!r}"
