"""``mini-infer kernels`` names every operation and backend, what was chosen, and why the rest was not."""

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from mini_infer import kernels
from mini_infer.cli import app
from mini_infer.cli.kernels import show_kernels
from mini_infer.kernels import registry


def shown(width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    show_kernels(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_operation_is_there_and_fits() -> None:
    text = shown()
    assert all(op in text for op in kernels.OPS)
    assert all(backend in text for backend in kernels.available_backends())
    assert "chosen" in text and "算子" in text and "原因" in text
    assert max(cell_len(line) for line in text.splitlines()) <= 80


def test_the_choice_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    kernels.register("rmsnorm", backend="mine", devices=("cpu",))(lambda x, weight, eps: x)
    monkeypatch.setenv("MINI_INFER_KERNELS", "mine")
    lines = shown(120).splitlines()
    assert any("MINI_INFER_KERNELS=mine" in line for line in lines)
    row = next(line for line in lines if " rmsnorm " in line)
    assert row.count("chosen") == 1 and row.rstrip("│ ").endswith("chosen"), "mine, the last column"
    registry._resolve.cache_clear()


def test_what_if_a_file_of_ones_own_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "from mini_infer.kernels import register\n"
        "register('paged_attention', backend='own')(lambda query, *others: query)\n"
    )
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["kernels", "--kernel-backend", f"{path}:own"])
    assert done.exit_code == 0 and "--kernel-backend" in done.output, done.output
    (attention,) = (line for line in done.output.splitlines() if " attention " in line)
    assert attention.count("chosen") == 2, "the reference writes and reads prompts, the file's kernel reads the rest"
    refused = CliRunner().invoke(app, ["kernels", "--kernel-backend", f"{path}:other"])
    assert refused.exit_code == 2 and "registers no backend" in " ".join(refused.output.replace("│", "").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_a_backend_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    kernels.register("rmsnorm", backend="for_gpus", devices=("cuda",))(lambda x, weight, eps: x)
    assert "for_gpus: no such device here (no GPU)" in shown(120)
    for key in [key for key in registry._table if key[1] == "cpu"]:
        del registry._table[key]
    assert "cpu: " in shown(120)


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["kernels"])
    assert done.exit_code == 0 and "rmsnorm" in done.output
    registry._resolve.cache_clear()
