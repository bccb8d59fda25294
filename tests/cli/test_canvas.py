"""The canvas of a diffusion model in the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from mini_infer import LLM, SamplingParams
from mini_infer.cli import canvas
from mini_infer.exceptions import InvalidConfigError
from tests.engine.checkpoints import make_engine_checkpoint, save_tokenizer
from tests.models.llada import make_llada_checkpoint


def test_every_step_is_a_line_and_every_mask_a_cell(tmp_path: Path) -> None:
    make_llada_checkpoint(tmp_path, 3)
    save_tokenizer(tmp_path)
    screen = io.StringIO()
    with LLM(tmp_path, device="cpu") as llm:
        llm.watch(canvas.CanvasView(Console(file=screen, width=200), llm))
        params = SamplingParams(temperature=0, gen_length=12, steps=6, ignore_eos=True)
        llm.generate([[1, 2, 3]], params)
    lines = screen.getvalue().splitlines()
    assert [line.count(canvas.MASK) for line in lines] == [10, 8, 6, 4, 2, 0]
    assert [int(line[:3]) for line in lines] == [1, 2, 3, 4, 5, 6]


def test_what_is_no_diffusion_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_engine_checkpoint(tmp_path)
    with pytest.raises(InvalidConfigError, match="writes one token after the other"):
        canvas.run_canvas_demo(Console(file=io.StringIO()), str(tmp_path))
    monkeypatch.setattr(canvas, "TUTOR", tmp_path / "nowhere")
    with pytest.raises(InvalidConfigError, match="no diffusion tutor is bundled here"):
        canvas.run_canvas_demo(Console(file=io.StringIO()), None)
