"""Small sums: a + b and a - b up to 50, a x b up to 9, with some operand pairs held out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .glossary import Language

HELDOUT_SHARE = 10  # one pair in so many
DRILL_LENGTH = 8
OPERATORS = {"+": 4, "-": 4, "×": 2}  # and how often each is practised
_SPLIT_SEED = 12

QUESTIONS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is {sum}?",
        "How much is {sum}?",
        "Calculate {sum}.",
        "Compute {sum}",
        "Can you work out {sum}?",
        "{sum} = ?",
        "{sum}",
    ),
    "zh": (
        "{sum} 等于多少？",
        "{sum} 等于几？",
        "{sum} 是多少？",
        "{sum} 得多少？",
        "计算 {sum}。",
        "请算一下 {sum}。",
    ),
}
SPELLINGS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {"+": ("+", "plus"), "-": ("-", "minus"), "×": ("×", "*", "x", "times")},
    "zh": {"+": ("+", "加", "加上"), "-": ("-", "减", "减去"), "×": ("×", "*", "乘", "乘以")},
}


@dataclass(frozen=True)
class Sum:
    a: int
    operator: str
    b: int

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "×": self.a * self.b}[self.operator]

    def answer(self, language: Language) -> str:
        stop = "." if language == "en" else "。"
        return f"{self.a} {self.operator} {self.b} = {self.result}{stop}"


def sums() -> tuple[list[Sum], list[Sum]]:
    """All sums, split once and for all into those to train on and those held out.

    Of the products only those are ever held out whose mirror image stays in training.
    """
    everything = [Sum(a, "+", b) for a in range(51) for b in range(51)]
    everything += [Sum(a, "-", b) for a in range(51) for b in range(a + 1)]
    everything += [Sum(a, "×", b) for a in range(10) for b in range(10)]
    eligible = [s for s in everything if s.operator != "×" or 1 < s.a < s.b]
    heldout = random.Random(_SPLIT_SEED).sample(eligible, len(eligible) // HELDOUT_SHARE)
    kept_out = set(heldout)
    return [s for s in everything if s not in kept_out], heldout


def sum_question(rng: random.Random, language: Language, problem: Sum) -> str:
    operator = rng.choice(SPELLINGS[language][problem.operator])
    gap = "" if operator in "+-×*" and rng.random() < 0.3 else " "
    written = f"{problem.a}{gap}{operator}{gap}{problem.b}"
    return rng.choice(QUESTIONS[language]).format(sum=written)


class Exercises:
    """Sums to practise, single or in drills; small ones come up most, as they do in life."""

    def __init__(self, problems: list[Sum]) -> None:
        self._by_operator = {
            operator: [problem for problem in problems if problem.operator == operator] for operator in OPERATORS
        }

    def one(self, rng: random.Random) -> Sum:
        return min(rng.choices(self._pool(rng), k=2), key=lambda problem: problem.a + problem.b)

    def drill(self, rng: random.Random) -> list[Sum]:
        """Some neighbouring sums, in order or not: a denser exercise than questions."""
        pool = self._pool(rng)
        start = rng.randrange(len(pool) - DRILL_LENGTH)
        chosen = pool[start : start + DRILL_LENGTH]
        return chosen if rng.random() < 0.5 else rng.sample(chosen, len(chosen))

    def _pool(self, rng: random.Random) -> list[Sum]:
        operator = rng.choices(list(OPERATORS), list(OPERATORS.values()))[0]
        return self._by_operator[operator]
