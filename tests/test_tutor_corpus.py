"""The corpus of the bundled tutor: rich enough, unambiguous, and fair to its own exam."""

from __future__ import annotations

import itertools
import json
import operator
import re
import string
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from tools.train_tutor.arithmetic import sums
from tools.train_tutor.corpus import Corpus
from tools.train_tutor.glossary import LANGUAGES
from tools.train_tutor.questions import (
    COMPARE_HELDOUT,
    COMPARE_TRAIN,
    HELDOUT,
    TRAIN,
    HeldOut,
    heldout_questions,
)

TUTOR = Path(__file__).parents[1] / "mini_infer" / "assets" / "tutor"
DOCUMENTS = 60_000
"""About as many as a training run reads."""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load()


@pytest.fixture(scope="module")
def prompts(corpus: Corpus) -> set[str]:
    """Everything that the tutor only reads in training, that is, the questions put to it."""
    return {
        segment.text.lower()
        for document in itertools.islice(corpus.documents(seed=0), DOCUMENTS)
        for segment in document
        if not segment.learn
    }


@pytest.fixture(scope="module")
def exam(corpus: Corpus) -> list[HeldOut]:
    return [q for language in LANGUAGES for q in heldout_questions(corpus.glossary, language)]


def fixed_words(template: str) -> list[str]:
    """What a template says around its names."""
    return [text.lower().strip() for text, *_ in string.Formatter().parse(template) if text.strip()]


@pytest.mark.parametrize("language", LANGUAGES)
def test_glossary_is_large_and_unambiguous(corpus: Corpus, language: str) -> None:
    entries = [term.entry(language) for term in corpus.glossary.terms]
    assert len(entries) >= 80
    answers = [entry.answer for entry in entries]
    answers += [comparison.answer(language) for comparison in corpus.glossary.comparisons]
    assert len(set(answers)) == len(answers)
    names = Counter(name.lower() for entry in entries for name in entry.names)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_begin_with_their_term(corpus: Corpus, language: str) -> None:
    for term in corpus.glossary.terms:
        entry = term.entry(language)
        opening = entry.with_article(entry.term)
        assert entry.answer.lower().startswith(opening.lower()), term.id
        assert entry.answer[-1] in ".。", term.id


def test_answers_are_in_their_own_language(corpus: Corpus) -> None:
    han = re.compile(r"[\u4e00-\u9fff]")
    for term in corpus.glossary.terms:
        assert not han.search(term.en.answer), term.id
        assert len(han.findall(term.zh.answer)) > len(term.zh.answer) / 3, term.id


@pytest.mark.parametrize("language", LANGUAGES)
def test_there_are_many_ways_to_ask(language: str) -> None:
    assert len(set(TRAIN[language])) == len(TRAIN[language]) >= 40
    assert len(set(HELDOUT[language])) == len(HELDOUT[language]) >= 8


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("train", "heldout"), [(TRAIN, HELDOUT), (COMPARE_TRAIN, COMPARE_HELDOUT)], ids=["ask", "compare"]
)
def test_heldout_templates_are_not_trained_on(
    train: dict[str, tuple[str, ...]], heldout: dict[str, tuple[str, ...]], language: str
) -> None:
    seen = {tuple(fixed_words(template)) for template in train[language]}
    assert [t for t in heldout[language] if tuple(fixed_words(t)) in seen] == []


def test_no_heldout_wording_occurs_in_training(exam: list[HeldOut], prompts: set[str]) -> None:
    templates = [t for language in LANGUAGES for t in HELDOUT[language] + COMPARE_HELDOUT[language]]
    for template in templates:
        words = fixed_words(template)
        assert not [prompt for prompt in prompts if all(word in prompt for word in words)], template
    text = "\n".join(prompts)
    assert [q.question for q in exam[::25] if q.question.lower() in text] == []


def test_every_term_is_trained_in_both_languages(corpus: Corpus) -> None:
    learnt = Counter(
        segment.text
        for document in itertools.islice(corpus.documents(seed=1), 10_000)
        for segment in document
        if segment.learn
    )
    for term in corpus.glossary.terms:
        for language in LANGUAGES:
            assert learnt[term.entry(language).answer + "<|im_end|>"] >= 5, (term.id, language)


def test_the_corpus_is_the_same_every_time(corpus: Corpus) -> None:
    first, second = (list(itertools.islice(corpus.documents(seed=7), 200)) for _ in range(2))
    assert first == second
    assert first != list(itertools.islice(corpus.documents(seed=8), 200))


def test_sums_are_right_and_heldout_ones_apart() -> None:
    train, kept_out = sums()
    assert not set(train) & set(kept_out)
    assert {s.operator for s in kept_out} == {"+", "-", "×"}
    results = {"+": operator.add, "-": operator.sub, "×": operator.mul}
    for problem in train + kept_out:
        result = results[problem.operator](problem.a, problem.b)
        assert problem.answer("en") == f"{problem.a} {problem.operator} {problem.b} = {result}."


def test_bundled_exam_is_the_one_of_the_corpus(exam: list[HeldOut]) -> None:
    bundled = json.loads((TUTOR / "heldout.json").read_text(encoding="utf-8"))
    assert bundled == [asdict(question) for question in exam]


def test_bundled_scores_meet_the_bar() -> None:
    scores = json.loads((TUTOR / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    for dtype in ("float32", "bfloat16"):
        for language in LANGUAGES:
            suite = scores[dtype][f"terms_{language}"]
            assert suite["correct"] >= 0.9 * suite["total"], (dtype, language)
