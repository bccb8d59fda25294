"""The bundled diffusion model: a real one for the loader, and answers that are known."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mini_infer import LLM, SamplingParams
from mini_infer.cli.canvas import run_canvas_demo
from mini_infer.config import BUNDLED_MODEL
from mini_infer.models.hub import BUNDLED, resolve_model

DIRECTORY = BUNDLED["diffusion-tutor"]
HELD_OUT = json.loads((Path(BUNDLED_MODEL) / "heldout.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("diffusion-tutor", dtype="float32", device="cpu", max_num_batched_tokens=4096)


def test_it_is_small_and_says_what_it_is() -> None:
    assert resolve_model("diffusion-tutor") == DIRECTORY
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) < 16 << 20
    scores = json.loads((DIRECTORY / "evaluation.json").read_text(encoding="utf-8"))["scores"]["float32"]
    for card in ("MODEL_CARD.md", "MODEL_CARD.zh.md"):
        text = (DIRECTORY / card).read_text(encoding="utf-8")
        assert "$" not in text
        for score in scores.values():
            assert f"({score['correct']}/{score['total']})" in text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_held_out_questions_are_answered_word_for_word(llm: LLM, language: str) -> None:
    questions = [one for one in HELD_OUT if one["lang"] == language]
    chosen = questions[:: len(questions) // 40][:40]
    params = SamplingParams(temperature=0, gen_length=64, steps=64, block_length=16)
    outputs = llm.chat([[{"role": "user", "content": one["question"]}] for one in chosen], params, use_tqdm=False)
    right = sum(output.text == one["answer"] for output, one in zip(outputs, chosen, strict=True))
    assert right >= 0.85 * len(chosen), f"{right} of {len(chosen)}"


def test_without_parameters_it_writes_in_its_own_blocks(llm: LLM) -> None:
    assert llm.default_sampling_params.block_length == 16
    [output] = llm.chat([{"role": "user", "content": "What is a KV cache?"}], use_tqdm=False)
    assert output.text.startswith("A KV cache stores the keys and values of all tokens")
    assert output.finish_reason == "stop"


def test_the_demo_fills_its_canvas() -> None:
    screen = io.StringIO()
    run_canvas_demo(Console(file=screen, width=200), None)
    shown = screen.getvalue()
    assert shown.count("What is a KV cache?") == shown.count("什么是分页注意力？") == 2
    assert "so that each new token attends to them without computing them again" in shown
