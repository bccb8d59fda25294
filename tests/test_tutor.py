"""The bundled model knows its glossary: asked in words it never saw, it gives the right answer word for word."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from mini_infer import LLM
from mini_infer.config import BUNDLED_MODEL

HELD_OUT = json.loads((Path(BUNDLED_MODEL) / "heldout.json").read_text(encoding="utf-8"))


def check(questions: list[dict[str, str]], dtype: str) -> None:
    llm = LLM(dtype=dtype, max_num_seqs=64)
    outputs = llm.chat(
        [[{"role": "user", "content": question["question"]}] for question in questions],
        temperature=0,
        max_tokens=200,
        use_tqdm=False,
    )
    asked, right = Counter(), Counter()
    for question, output in zip(questions, outputs, strict=True):
        asked[question["lang"]] += 1
        right[question["lang"]] += output.text.strip() == question["answer"]
    print({lang: f"{right[lang]} of {asked[lang]}" for lang in asked})
    for lang in ("en", "zh"):
        assert right[lang] >= 0.9 * asked[lang], f"{lang}: {right[lang]} of {asked[lang]} word for word"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_question_was_held_out(lang: str) -> None:
    assert len({question["term"] for question in HELD_OUT if question["lang"] == lang}) >= 80


def test_held_out_questions() -> None:
    check(random.Random(0).sample(HELD_OUT, 800), "auto")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_held_out_questions(dtype: str) -> None:
    check(HELD_OUT, dtype)
