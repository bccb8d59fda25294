"""The command line, run as people run it: in a process of its own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import mini_infer
from mini_infer import kernels
from mini_infer.cli import app
from mini_infer.config import BUNDLED_MODEL

ENTRY = "from mini_infer.cli import app; app(prog_name='mini-infer')"
ROOT = Path(mini_infer.__file__).parents[1]

COMMANDS = ("chat", "generate", "serve", "demo", "info", "bench", "kernels", "rank", "trace", "learn")

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


def test_where_the_console_knows_only_ascii() -> None:
    """Its help has Chinese in it."""
    done = run("--help", encoding="ascii")
    assert done.returncode == 0 and "Usage: mini-infer" in done.stdout and "?" in done.stdout


def test_without_a_command_it_shows_its_help() -> None:
    shown = CliRunner().invoke(app, [], prog_name="mini-infer").output
    assert "Usage: mini-infer" in shown and "Traceback" not in shown


@pytest.mark.parametrize("arguments", [["dmeo"], ["--verison"], ["demo", "--colour"]], ids=" ".join)
def test_a_typo_is_an_error_without_a_traceback(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert arguments[-1] in done.stderr and done.stderr.count("\n") == 1


def test_looking_at_the_help_loads_no_torch() -> None:
    code = "import sys, mini_infer.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mini_infer", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"mini-infer {mini_infer.__version__}\n"


def test_every_command_is_in_the_help() -> None:
    shown = run("--help").stdout
    assert [name for name in COMMANDS if f"│ {name} " not in shown] == []
    assert "mini-infer demo" in shown and "Exit status" in shown


@pytest.mark.parametrize("flag", ["--debug trace no/such/file", "trace --debug no/such/file"])
def test_an_error_is_one_line_unless_debugged(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    group = typer.main.get_command(app)
    words = flag.split()
    assert group.main([word for word in words if word != "--debug"], standalone_mode=False) == 1
    plain = capsys.readouterr().err
    assert group.main(words, standalone_mode=False) == 1
    debugged = capsys.readouterr().err
    assert plain == "error: cannot read 'no/such/file': No such file or directory; " + plain.split("; ")[1]
    assert debugged.startswith("Traceback") and debugged.endswith(plain) and "in load_trace" in debugged


def test_what_nobody_foresaw_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("so much\nfor that")

    module = importlib.import_module("mini_infer.cli.kernels")  # the package has a function of that name, too
    monkeypatch.setattr(module, "show_kernels", broken)
    done = CliRunner().invoke(app, ["kernels"])
    assert (done.exit_code, done.stderr) == (1, "error: ZeroDivisionError: so much for that; --debug shows where\n")


def test_serving_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mini_infer.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 1
    assert "fastapi" in done.stderr and "pip install 'mini-infer[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_shell_can_complete_it() -> None:
    asked = {"_MINI_INFER_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    flags = run(COMP_WORDS="mini-infer chat --max-", **asked).stdout.split()
    assert {"--max-model-len", "--max-tokens", "--max-num-seqs"} <= set(flags)
    commands = run(COMP_WORDS="mini-infer ", **{**asked, "COMP_CWORD": "1"}).stdout.split()
    assert set(COMMANDS) <= set(commands)


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

    def test_functions_are_called(self, done: subprocess.CompletedProcess[str]) -> None:
        """Each call is shown with its result, and the answer says it."""
        for call, result in (
            ('"tokens": 4096}', "469762048"),
            ('count_blocks({"tokens": 1000, "block_size": 16}', "63"),
        ):
            shown, answer = done.stdout.split(f"{call}) = {result}\n")
            assert shown.strip() and result in answer.splitlines()[0]

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


@pytest.mark.skipif((Path(BUNDLED_MODEL) / "model.safetensors").exists(), reason="the bundled model is there")
def test_the_demo_without_its_model_says_so() -> None:
    done = run("demo")
    assert done.returncode == 1
    assert "error:" in done.stderr and "Traceback" not in done.stderr
