"""The canvas of a diffusion model in the terminal."""

import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from mini_infer import LLM, SamplingParams
from mini_infer.cli import app, canvas
from mini_infer.cli.terminal import MASK
from mini_infer.cli.trace import NUM_CANVASES, show_trace
from mini_infer.exceptions import InvalidConfigError
from tests.cli.terminal import CTRL_D, Terminal
from tests.cli.test_cli import ENTRY, ROOT
from tests.engine.checkpoints import make_engine_checkpoint, save_tokenizer
from tests.engine.test_block_diffusion import make
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
    assert [line.count(MASK) for line in lines] == [10, 8, 6, 4, 2, 0]
    assert [int(line[:3]) for line in lines] == [1, 2, 3, 4, 5, 6]


def test_what_is_no_diffusion_model_is_refused(tmp_path: Path) -> None:
    make_engine_checkpoint(tmp_path)
    with pytest.raises(InvalidConfigError, match="writes one token after the other"):
        canvas.run_canvas_demo(Console(file=io.StringIO()), str(tmp_path))


@pytest.mark.parametrize("width", [40, 100])
def test_a_trace_shows_canvases(tmp_path: Path, width: int) -> None:
    make_llada_checkpoint(tmp_path, 3)
    save_tokenizer(tmp_path)
    file = tmp_path / "run.json"
    with LLM(tmp_path, device="cpu", trace=file) as llm:
        params = SamplingParams(temperature=0, gen_length=40, steps=40, ignore_eos=True)
        llm.generate([[1, 2, 3]] * 5, params)
    screen = io.StringIO()
    show_trace(file, Console(file=screen, width=width), 40)
    shown = screen.getvalue()
    assert max(map(cell_len, shown.splitlines())) <= width
    canvases = shown.split("Canvas · 画布")[1].split("Block map")[0]
    assert "... and 1 more canvases" in canvases
    lines = re.split(r"\n(?= ?\d+ +\S)", canvases)[1:]
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == [40 * part // 16 for part in range(1, 17)] * NUM_CANVASES
    assert [line.count(MASK) for line in lines] == [40 - number for number in numbers]


def test_a_chat_in_a_terminal_shows_the_canvas_until_the_answer_is_there(tmp_path: Path) -> None:
    model = make_llada_checkpoint(tmp_path / "model", 3)
    save_tokenizer(model)
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}
    settings |= {"XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    options = ("--device", "cpu", "--temperature", "0", "--max-tokens", "30", "--ignore-eos")
    with Terminal("-c", ENTRY, "chat", str(model), *options, environment=settings, cwd=tmp_path) as terminal:
        terminal.expect("/help shows the commands.*\n> ")
        terminal.type("hi\n")
        shown = terminal.expect(r"30 tokens · .*\r?\n> ")
        terminal.type(CTRL_D)
        assert terminal.status() == 0
    counts = [line.count(MASK) for line in re.split(r"[\r\n]+", shown) if MASK in line]
    assert counts == list(range(29, 0, -1))


def test_a_chat_that_is_piped_prints_text_alone(tmp_path: Path) -> None:
    model = make_llada_checkpoint(tmp_path, 3)
    save_tokenizer(model)
    options = ("--device", "cpu", "--temperature", "0", "--max-tokens", "12", "--dtype", "float64")
    done = CliRunner().invoke(app, ["chat", str(model), *options], input="hi\n")
    assert done.exit_code == 0, done.output
    assert "model of type" not in done.stderr
    with LLM(model, device="cpu", dtype="float64") as llm:
        params = SamplingParams(temperature=0, gen_length=12)
        assert done.stdout == llm.chat([{"role": "user", "content": "hi"}], params)[0].text + "\n"


def test_the_demo_of_a_model_that_sees_in_blocks_shows_them_come(tmp_path: Path) -> None:
    screen = io.StringIO()
    canvas.run_canvas_demo(Console(file=screen, width=200), str(make(tmp_path, 5, 4)))
    lines = [line for line in screen.getvalue().splitlines() if line[:3].strip().isdigit()]
    assert len(lines) > 20 and max(line.count(MASK) for line in lines) == 4
