"""How often the tutor is right, word for word, on questions that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from .arithmetic import QUESTIONS, Sum, sums
from .calls import heldout_calls, offer
from .corpus import Exchange, Segment, call_chat, chat
from .glossary import LANGUAGES, Glossary, Language
from .questions import HeldOut, heldout_comparisons, heldout_questions
from .train import IGNORED, encode

BATCH = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def evaluate(directory: Path, glossary: Glossary) -> dict:
    """Exact-match scores of an exported tutor, computing in float32 and in bfloat16."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    scores: dict = {}
    for name, dtype in DTYPES.items():
        model = Qwen3ForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        scores[name] = {}
        plain = {suite: [chat([one]) for one in exchanges] for suite, exchanges in suites(glossary).items()}
        for suite, documents in {**plain, **call_suites(glossary)}.items():
            correct = sum(exact(model, tokenizer, documents))
            scores[name][suite] = {"correct": correct, "total": len(documents)}
    return scores


def suites(glossary: Glossary) -> dict[str, list[Exchange]]:
    _, problems = sums()
    suites: dict[str, list[Exchange]] = {}
    for language in LANGUAGES:
        suites[f"terms_{language}"] = _exchanges(heldout_questions(glossary, language))
        suites[f"comparisons_{language}"] = _exchanges(heldout_comparisons(glossary, language))
    for operator, name in {"+": "addition", "-": "subtraction", "×": "multiplication"}.items():
        suites[name] = [
            Exchange(_written(problem, language), problem.answer(language))
            for problem in problems
            if problem.operator == operator
            for language in LANGUAGES
        ]
    return suites


def call_suites(glossary: Glossary) -> dict[str, list[list[Segment]]]:
    """Conversations with tools: right if the call, and then the answer to its result, are; and, in those that need
    none, if there is no call."""
    suites: dict[str, list[list[Segment]]] = {}
    for language in LANGUAGES:
        for call in heldout_calls(glossary, language):
            suites.setdefault(f"{call.name}_{language}", []).append(call_chat([call], offer()))
        exchanges = _exchanges(heldout_questions(glossary, language))[::10]
        suites[f"no_call_{language}"] = [call_chat([exchange], offer()) for exchange in exchanges]
    return suites


def _exchanges(questions: list[HeldOut]) -> list[Exchange]:
    return [Exchange(q.question, q.answer) for q in questions]


def _written(problem: Sum, language: Language) -> str:
    return QUESTIONS[language][0].format(sum=f"{problem.a} {problem.operator} {problem.b}")


@torch.inference_mode()
def exact(model: Qwen3ForCausalLM, tokenizer: Tokenizer, documents: Sequence[list[Segment]]) -> list[bool]:
    """Whether greedy decoding would write each answer and then stop.

    It does if and only if every token of the answer has the highest logit after the tokens before
    it, so one forward pass over question and answer replaces the generation.

    Args:
        documents: conversations; what is learnt of them are the answers.
    """
    encoded = [encode(tokenizer, document) for document in documents]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    verdicts = [False] * len(encoded)
    for indices in _chunks(order, BATCH):
        width = max(len(encoded[i][0]) for i in indices)
        # Padding on the right needs no mask: with causal attention nothing looks at it.
        ids = torch.tensor([encoded[i][0] + [0] * (width - len(encoded[i][0])) for i in indices])
        labels = torch.tensor([encoded[i][1] + [IGNORED] * (width - len(encoded[i][1])) for i in indices])[:, 1:]
        predicted = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right = ((predicted == labels) | (labels == IGNORED)).all(dim=1)
        for i, verdict in zip(indices, right.tolist(), strict=True):
            verdicts[i] = verdict
    return verdicts


def _chunks(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
