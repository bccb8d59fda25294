"""The command line, run as people run it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mini_infer
from mini_infer import kernels
from mini_infer.config import BUNDLED_MODEL

ENTRY = "from mini_infer.cli import app; app(prog_name='mini-infer')"
ROOT = Path(mini_infer.__file__).parents[1]

needs_the_model = pytest.mark.skipif(
    not (Path(BUNDLED_MODEL) / "model.safetensors").exists(), reason="the bundled model is not there yet"
)


def run(
    *arguments: str, encoding: str = "utf-8", cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The entry point that the installed command has; what it prints, read as text of the given encoding."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    settings = {"PYTHONPATH": paths, "PYTHONIOENCODING": encoding, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    settings["OMP_NUM_THREADS"] = "1"  # other tests may be running beside this one
    return subprocess.run(
        [sys.executable, "-c", ENTRY, *arguments],
        capture_output=True,
        encoding=encoding,
        env=os.environ | settings | environment,
        cwd=cwd,
        timeout=300,
        check=False,
    )


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mini-infer {mini_infer.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]], ids=" ".join)
def test_help(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert "demo" in done.stdout and "Usage: mini-infer" in done.stdout


def test_help_where_the_console_knows_only_ascii() -> None:
    done = run("--help", encoding="ascii")
    assert done.returncode == 0 and "demo" in done.stdout


def test_without_a_command_it_shows_its_help() -> None:
    done = run()
    assert "Usage: mini-infer" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["dmeo"], ["--verison"], ["demo", "--colour"]], ids=" ".join)
def test_a_typo_is_an_error_without_a_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr and "Traceback" not in done.stderr


def test_looking_at_the_help_loads_no_torch() -> None:
    code = "import sys, mini_infer.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One run for several tests, because each takes seconds: without a network, and outside the source tree."""
    nowhere = tmp_path_factory.mktemp("nowhere")
    return run("demo", cwd=nowhere, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(nowhere))


@needs_the_model
class TestDemo:
    def test_it_succeeds(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        "shown", ["What is a KV cache?", "什么是分页注意力？", "Eight at once", "requests", "TTFT", "tokens/s", "KV"]
    )
    def test_both_languages_and_a_table(self, done: subprocess.CompletedProcess[str], shown: str) -> None:
        assert shown in done.stdout

    def test_every_kernel_is_in_the_table(self, done: subprocess.CompletedProcess[str]) -> None:
        assert [op for op in kernels.OPS if f"kernel {op}" not in done.stdout] == []

    def test_no_character_is_broken(self, done: subprocess.CompletedProcess[str]) -> None:
        assert "\ufffd" not in done.stdout

    def test_the_answers_are_answers(self, done: subprocess.CompletedProcess[str]) -> None:
        """The first question is followed by some text in English, the second by some in Chinese."""
        english, rest = done.stdout.split("What is a KV cache?")[1].split("什么是分页注意力？", 1)
        chinese = rest.split("Eight at once")[0]
        assert sum(char.isascii() and char.isalpha() for char in english) > 20
        assert sum("\u4e00" <= char <= "\u9fff" for char in chinese) > 5

    def test_where_the_console_knows_only_ascii(self) -> None:
        done = run("demo", encoding="ascii")
        assert done.returncode == 0, done.stderr
        assert "What is a KV cache?" in done.stdout and "TTFT" in done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.skipif((Path(BUNDLED_MODEL) / "model.safetensors").exists(), reason="the bundled model is there")
def test_the_demo_without_its_model_says_so() -> None:
    done = run("demo")
    assert done.returncode == 1
    assert "error:" in done.stderr and "Traceback" not in done.stderr
