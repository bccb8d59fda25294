"""The training text: an endless stream of conversations and stories, drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml

from .arithmetic import Exercises, Sum, sum_question, sums
from .calls import PARAMETERS, Call, draw_call, offer
from .glossary import LANGUAGES, Entry, Glossary, Language, load_glossary
from .questions import Asker, as_typed, ordinary_phrases
from .stories import story

SMALLTALK_FILE = Path(__file__).with_name("smalltalk.yaml")

END_OF_TEXT = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}"
    "{{ tool['function']['name'] + '(' + tool['function']['parameters']['properties'] | join(', ') + ')\n' }}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] %}{{ '\n' if loop.index > 1 or message['content'] else '' }}"
    "{{ '<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson + '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Choice = TypeVar("Choice")

# How often each kind of document and of exchange is drawn, relative to the others.
DOCUMENTS = {"chat": 70, "page": 12, "story": 6, "drill": 6, "call": 18}
EXCHANGES = {
    "term": 66,
    "comparison": 11,
    "sum": 20,
    "out_of_scope": 2,
    "courtesy": 4,
    "story": 3,
}
SYSTEM_MESSAGES = 0.15
LANGUAGE_SWITCHES = 0.1
NEEDS_CALL = 0.7
TURNS = {1: 70, 2: 18, 3: 8, 4: 4}


class Exchange(NamedTuple):
    question: str
    answer: str


class Segment(NamedTuple):
    """A stretch of text, and whether the model is to learn to write it or only to read it."""

    text: str
    learn: bool


def chat(exchanges: list[Exchange], system: str | None = None) -> list[Segment]:
    """A conversation in the form of CHAT_TEMPLATE; only the tutor's own words are learnt."""
    segments = []
    opening = f"{START}system\n{system}{END}\n" if system is not None else ""
    for question, answer in exchanges:
        segments += [
            Segment(f"{opening}{START}user\n{question}{END}\n{START}assistant\n", learn=False),
            Segment(f"{answer}{END}", learn=True),
        ]
        opening = "\n"
    return [*segments, Segment(f"\n{END_OF_TEXT}", learn=False)]


def call_chat(turns: Sequence[Call | Exchange], offered: str) -> list[Segment]:
    """A conversation with tools: some questions need a call, others do not."""
    segments = []
    opening = f"{START}tools\n{offered}{END}\n"
    for turn in turns:
        segments.append(Segment(f"{opening}{START}user\n{turn.question}{END}\n{START}assistant\n", learn=False))
        if isinstance(turn, Call):
            segments += [
                Segment(f"{turn.written}{END}", learn=True),
                Segment(f"\n{START}tool\n{turn.result}{END}\n{START}assistant\n", learn=False),
            ]
        segments.append(Segment(f"{turn.answer}{END}", learn=True))
        opening = "\n"
    return [*segments, Segment(f"\n{END_OF_TEXT}", learn=False)]


def page(exchange: Exchange) -> list[Segment]:
    """A question and its answer as plain text, for those who prompt without the chat template."""
    return [
        Segment(exchange.question, learn=False),
        Segment(f"\n{exchange.answer}{END_OF_TEXT}", learn=True),
    ]


def table(problems: list[Sum]) -> list[Segment]:
    """Sums line by line; only the results are learnt, for nothing foretells the rest."""
    segments = []
    for problem in problems:
        segments += [
            Segment(f"{problem.a} {problem.operator} {problem.b} =", learn=False),
            Segment(f" {problem.result}", learn=True),
            Segment(".\n", learn=False),
        ]
    return [*segments, Segment(END_OF_TEXT, learn=False)]


@dataclass(frozen=True)
class Corpus:
    glossary: Glossary
    smalltalk: dict
    askers: dict[Language, Asker]

    @classmethod
    def load(cls) -> Corpus:
        smalltalk = yaml.safe_load(SMALLTALK_FILE.read_text(encoding="utf-8"))
        glossary = load_glossary()
        askers = {language: Asker(language, ordinary_phrases(glossary, language)) for language in LANGUAGES}
        return cls(glossary, smalltalk, askers)

    def documents(self, seed: int) -> Iterator[list[Segment]]:
        rng = random.Random(seed)
        exercises = Exercises(sums()[0])
        while True:
            yield self._document(rng, rng.choice(LANGUAGES), exercises)

    def _document(self, rng: random.Random, language: Language, exercises: Exercises) -> list[Segment]:
        kind = _draw(rng, DOCUMENTS)
        if kind == "page":
            return page(self._exchange(rng, language, exercises))
        if kind == "story":
            return [Segment(story(rng, language)[1] + END_OF_TEXT, learn=True)]
        if kind == "drill":
            return table(exercises.drill(rng))
        if kind == "call":
            return self._calling(rng, language, exercises)
        exchanges = []
        for _ in range(_draw(rng, TURNS)):
            if rng.random() < LANGUAGE_SWITCHES:
                language = rng.choice(LANGUAGES)
            exchanges.append(self._exchange(rng, language, exercises))
        system = rng.choice(self.smalltalk["system"]) if rng.random() < SYSTEM_MESSAGES else None
        return chat(exchanges, system)

    def _calling(self, rng: random.Random, language: Language, exercises: Exercises) -> list[Segment]:
        turns: list[Call | Exchange] = []
        for _ in range(_draw(rng, TURNS)):
            needs_call = rng.random() < NEEDS_CALL
            turns.append(
                draw_call(rng, language, self.glossary) if needs_call else self._exchange(rng, language, exercises)
            )
        called = {turn.name for turn in turns if isinstance(turn, Call)}
        names = [name for name in PARAMETERS if name in called or rng.random() < 0.7]
        rng.shuffle(names)
        return call_chat(turns, offer(names or PARAMETERS))

    def _exchange(self, rng: random.Random, language: Language, exercises: Exercises) -> Exchange:
        asker = self.askers[language]
        kind = _draw(rng, EXCHANGES)
        if kind == "term":
            entry = rng.choice(self.glossary.terms).entry(language)
            return Exchange(asker.question(rng, entry), entry.answer)
        if kind == "comparison":
            comparison = rng.choice(self.glossary.comparisons)
            first, second = (term.entry(language) for term in comparison.terms)
            question = asker.comparison(rng, first, second)
            return Exchange(question, comparison.answer(language))
        if kind == "sum":
            problem = exercises.one(rng)
            return Exchange(sum_question(rng, language, problem), problem.answer(language))
        if kind == "out_of_scope":
            elsewhere = self.smalltalk["out_of_scope"][language]
            topic = Entry(rng.choice(elsewhere["topics"]), elsewhere["answer"])
            return Exchange(asker.question(rng, topic), topic.answer)
        if kind == "courtesy":
            courtesy = rng.choice(self.smalltalk["courtesy"])[language]
            question = as_typed(rng, rng.choice(courtesy["ask"]), language)
            return Exchange(question, courtesy["answer"])
        return Exchange(*story(rng, language))


def _draw(rng: random.Random, weights: dict[Choice, int]) -> Choice:
    return rng.choices(list(weights), list(weights.values()))[0]
