"""The parity command itself, run as people run it: on Triton's interpreter, on a learner's kernel, on a broken one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import INTERPRETED

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_rmsnorm.py"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", *arguments]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    return subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )


def parity(backend: str) -> tuple[int, str]:
    process = start("tests/kernels", "--kernel-backend", backend)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests beside this one run Triton compiled on this GPU")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_interpreted(chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The smaller half of the table, in two processes: whether to interpret is settled when triton is imported."""
    command = ("tests/kernels", "--kernel-backend", "triton", "-m", chosen)
    halves = [
        start(*command, "-k", which, TRITON_INTERPRET="1", PYTHONIOENCODING="utf-8")
        for which in ("attention or prefill or decode", "not (attention or prefill or decode)")
    ]
    outputs = [half.communicate(timeout=600)[0] for half in halves]
    with capsys.disabled():
        print("".join(f"\n  interpreted: {output.strip().splitlines()[-1]}" for output in outputs))
    for half, output in zip(halves, outputs, strict=True):
        assert half.returncode == 0, output


def test_the_example_passes() -> None:
    code, output = parity(f"{EXAMPLE}:mine")
    assert code == 0, output
    assert "rmsnorm" not in output and " passed" in output


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mean_square + eps", "mean_square"),
        ("mean_square + eps", "mean_square.roll(1, 0) + eps"),
    ],
    ids=["without eps", "the wrong row"],
)
def test_a_bug_in_it_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    assert source.count(right) == 1
    broken = tmp_path / "my_rmsnorm.py"
    broken.write_text(source.replace(right, wrong), encoding="utf-8")
    code, output = parity(f"{broken}:mine")
    assert code == 1, output
    message = next(line for line in output.splitlines() if line.startswith("rmsnorm on backend 'mine' (cpu): row ["))
    assert "has relative error " in message and "tolerance " in message and "rows are wrong" in message
    assert "  case: rmsnorm[" in output, "the case is named"
    assert "  got:    [" in output and "  wanted: [" in output


def test_an_unknown_backend_is_refused() -> None:
    code, output = parity("warp")
    assert code == pytest.ExitCode.USAGE_ERROR and "unknown kernel backend 'warp'; available: " in output, output
