"""The GPU suite rehearsed at toy sizes: every section runs, and one that fails or hangs costs only itself."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.gpu_suite.figure import TINY, Context, Figure, untaken
from benchmarks.gpu_suite.isolation import Section, run

from .cases import INTERPRETED

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the suite ends its sections as POSIX process groups"),
    pytest.mark.skipif(INTERPRETED, reason="this has nothing to do with Triton's interpreter"),
]


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=600)


def report_in(folder: Path) -> dict[str, Any]:
    """The figures of the only report there."""
    (file,) = folder.iterdir()
    assert file.name.startswith("gpu-") and file.name.endswith("-tiny.json")
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return figures


def test_a_section_in_a_process_of_its_own(tmp_path: Path) -> None:
    process = suite("--tiny", "--only", "products", "--output", str(tmp_path))
    assert process.returncode == 0, process.stdout + process.stderr
    assert report_in(tmp_path)["products"]["error"] is None
    assert "products, " in process.stdout


def at_once(section: Section, context: Context, limit: float) -> tuple[list[Figure], str | None]:
    """As `run`, in this process, which has imported everything already."""
    return list(section(context)), None


def test_every_section_yields_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_suite import __main__ as command  # which takes seconds to import, for this test alone

    monkeypatch.setattr(command, "run", at_once)
    with pytest.raises(typer.Exit) as ended:
        command.main(tiny=True, output=tmp_path)
    assert ended.value.exit_code == 0
    sections = report_in(tmp_path)
    in_order = ["parity", "kernels", "attention", "products", "steps", "workload", "equality", "profile", "diffusion"]
    assert list(sections) == in_order
    assert not any(section["error"] for section in sections.values())

    def names(section: str, verdict: str | None = None) -> str:
        figures = sections[section]["figures"]
        return "\n".join(figure["what"] for figure in figures if verdict in (None, figure["verdict"]))

    assert all(figure["verdict"] == "pass" for figure in sections["parity"]["figures"])
    for op in ("rmsnorm", "add_rmsnorm", "apply_rotary_emb", "qk_norm_rope", "silu_and_mul", "write_kv"):
        assert op in names("kernels") and op in names("parity", "pass")
    assert "paged_attention" in names("attention") and "paged_prefill_attention" in names("attention")
    assert all(f", {kind}, " in names("products") for kind in ("int8", "int4", "float8"))
    timed = next(figure for figure in sections["kernels"]["figures"] if figure["what"].startswith("rmsnorm"))
    assert {"bytes", "floor_microseconds", "microseconds", "gb_per_s"} <= timed["details"].keys()
    assert timed["bar"] == 85 and {"transformers, eager", "F.rms_norm"} <= timed["details"]["times_faster_than"].keys()
    assert "against its floor" in names("steps")
    assert "generate_batch" in names("workload") and "holds no token" in names("workload")
    assert names("equality", "miss") == ""
    assert "all kernels of a step" in names("profile")
    assert names("diffusion").count("batch 16") == 4 and names("diffusion", "untaken") == ""
    assert names("diffusion", "pass").count("float32") == 2


def test_an_unknown_section_is_refused() -> None:
    process = suite("--tiny", "--only", "kernels,warp")
    assert process.returncode == 2 and "no section ['warp']" in process.stderr


def good_then_bad(_: Context) -> Iterator[Figure]:
    yield Figure("one", 1.0, "ms", bar=2, at_most=True)
    raise RuntimeError("out of ideas")


def good_then_gone(_: Context) -> Iterator[Figure]:
    yield Figure("one", 1.0, "ms", bar=2)
    time.sleep(0.1)  # what was sent is on its way
    os._exit(7)


def good_then_asleep(_: Context) -> Iterator[Figure]:
    yield Figure("one", 1.0, "ms")
    while True:
        time.sleep(60)


@pytest.mark.parametrize(
    ("section", "limit", "verdict", "says"),
    [
        (good_then_bad, 120, "pass", "RuntimeError: out of ideas"),
        (good_then_gone, 120, "miss", "ended with exit code 7"),
        (good_then_asleep, 30, "", "its 30 seconds were up"),
    ],
)
def test_a_section_that_goes_wrong_keeps_what_it_measured(
    section: Section, limit: float, verdict: str, says: str, tmp_path: Path
) -> None:
    figures, error = run(section, Context(TINY, tmp_path), limit)
    assert [(figure.what, figure.verdict) for figure in figures] == [("one", verdict)]
    assert error is not None and says in error


def test_what_could_not_be_taken_says_why() -> None:
    figure = untaken("a step", "ms", ValueError("no\nsecond line"), 1.2)
    assert figure.verdict == "untaken" and figure.to_dict()["details"] == {"why": "ValueError: no"}
