"""``mini-infer chat``: piped, and in a terminal with a person's fingers on Ctrl-C."""

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mini_infer import LLM
from mini_infer.cli import app
from mini_infer.cli.functions import Functions
from mini_infer.exceptions import InvalidRequestError
from tests.cli.terminal import BACKSPACE, CTRL_C, CTRL_D, CTRL_U, Terminal
from tests.cli.test_cli import ENTRY, ROOT, needs_the_model
from tests.engine.checkpoints import make_engine_checkpoint

pytestmark = needs_the_model

EXACT = ("--dtype", "float64", "--device", "cpu", "--temperature", "0")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float64", device="cpu")


def chat(typed: str | bytes, *arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(app, ["chat", *EXACT, *arguments], input=typed)
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done


def answer(llm: LLM, *turns: str, max_tokens: int = 1000, system: str | None = None) -> str:
    """What the engine itself says to a conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    return llm.chat(messages, temperature=0, max_tokens=max_tokens)[0].text


def test_a_piped_conversation_is_the_engines(llm: LLM) -> None:
    """The second question goes with the first one and its answer; after /reset, alone."""
    first, second = "What is a KV cache?", "什么是预填充？"
    done = chat(f"{first}\n\n  {second}  \n/reset\n{second}\n/exit\nnever asked\n")
    one = answer(llm, first)
    two = answer(llm, first, one, second)
    assert done.stdout == f"{one}\n{two}\n{answer(llm, second)}\n"
    figures = re.findall(r"\d+ tokens · \d+ tokens/s · TTFT \d+ ms · context (\d+) of 1024\n", done.stderr)
    assert len(figures) == 3 and int(figures[0]) < int(figures[1]) > int(figures[2])
    assert "a new conversation\n" in done.stderr and "> " not in done.stdout


def test_options_and_system_message(llm: LLM) -> None:
    question = "What is 7 + 8?"
    typed = [
        "/set max_tokens 3",
        question,
        "/reset",
        "/system 请用中文",
        question,
        "/set max-tokens none",
        "/system",
        "/set top_p",
    ]
    done = chat("\n".join(typed))
    short = answer(llm, question, max_tokens=3)
    assert done.stdout == f"{short}\n{answer(llm, question, max_tokens=3, system='请用中文')}\n"
    notes = [line for line in done.stderr.splitlines() if " · " not in line]
    assert notes == [
        "max_tokens: 3",
        "a new conversation",
        "system: 请用中文",
        "max_tokens: None",
        "system: 请用中文",
        "top_p: 1.0",
    ]
    assert done.stderr.count("cut at max_tokens") == 2
    assert chat(question, "--system", "请用中文", "--max-tokens", "3").stdout == done.stdout.splitlines(True)[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "there is no /nope; /help shows what there is"),
        ("/set volume 11", "there is no sampling option 'volume'; /set shows what there is"),
        ("/set temperature hot", "temperature must be a finite number of at least 0, got 'hot'"),
        ("/set top_p 2", "top_p must be a finite number of at least 0 and at most 1, got 2.0"),
        ("/set n 2", "a chat shows one answer but n is 2; use mini-infer generate for several"),
        ("word " * 3000, "the context is full: "),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(line: str, message: str) -> None:
    done = chat(f"{line}\n/set top_k\nhi", "--max-tokens", "1", status=2)
    assert f"error: {message}" in done.stderr and "top_k: -1\n" in done.stderr
    assert done.stdout.count("\n") == 1, "the message after it is answered"


def test_a_conversation_that_fills_the_context() -> None:
    """It says so, refuses the next message, and goes on after /reset."""
    question = "What is a KV cache?"
    done = chat(f"{question}\n{question}\n/reset\n{question}\n", "--max-model-len", "30", status=2)
    reset = "/reset starts a new conversation\n"
    full = rf"\d+ tokens · \d+ tokens/s · TTFT \d+ ms · context 30 of 30 · the context is full: {reset}"
    refused = rf"error: the context is full: the conversation has \d+ tokens, 30 fit\. {reset}"
    assert re.fullmatch(f"{full}{refused}a new conversation\n{full}", done.stderr)
    first, second = done.stdout.splitlines()
    assert first == second


def test_help_and_set_list_everything() -> None:
    shown = chat("/help\n/set\n").stderr
    assert all(command in shown for command in ("/reset", "/system", "/set", "/help", "/exit", "Ctrl-D"))
    assert all(option in shown for option in ("temperature", "top_k", "logit_bias", "skip_special_tokens"))


@pytest.mark.parametrize("flags", [("--n", "2"), ("--temperature", "-1"), ("--max-model-len", "0")])
def test_flags_that_cannot_be_used(flags: tuple[str, str]) -> None:
    error = chat("hi", *flags, status=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    checkpoint = make_engine_checkpoint(tmp_path / "model", num_hidden_layers=1)
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    error = chat("hi", str(checkpoint), status=2).stderr
    assert error.startswith(f"error: {checkpoint} cannot chat: ") and "mini-infer generate needs none" in error
    assert error.count("\n") == 1


def test_piped_bytes_that_are_no_text() -> None:
    done = chat(b"\xef\xbb\xbfhi\n\xff\n", "--max-tokens", "1", status=2)
    assert done.stdout.count("\n") == 1
    assert "error: standard input, line 2: byte 1 is 0xff, which is not UTF-8" in done.stderr


def test_in_a_terminal(tmp_path: Path) -> None:
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}
    settings |= {"XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    with Terminal("-c", ENTRY, "chat", *EXACT, environment=settings, cwd=tmp_path) as terminal:
        terminal.expect("/help shows the commands.*\n> ")
        terminal.type("什么是预填充？\n")
        shown = terminal.expect(r"TTFT \d+ ms · context \d+ of 1024\r?\n> ")
        assert "预填充把提示词的全部词元" in shown
        # An answer as long as the context allows is stopped; the program and the conversation go on.
        terminal.type("/set ignore_eos true\n")
        terminal.expect("ignore_eos: True\r?\n> ")
        terminal.type("What is a KV cache?\n")
        terminal.expect("KV cache stores")
        terminal.type(CTRL_C)
        shown = terminal.expect(r"context (\d+) of 1024 · stopped\r?\n> ")
        assert "\ufffd" not in shown
        # Ctrl-C while typing forgets the line.
        terminal.type("forget this")
        terminal.expect("forget this")
        terminal.type(CTRL_C)
        forgotten = r"\(Ctrl-D leaves\)\r?\n> "
        if not terminal.shows(forgotten, 10):
            # It came after Python had shown the last letter and before it waited for the next: Python has noted it,
            # and acts on it after the line. Were the machine only slow, this is an empty line, which changes nothing.
            terminal.type(CTRL_U + "\n")
        terminal.expect(forgotten)
        terminal.type("/set ignore_eos false\n")
        terminal.expect("ignore_eos: False\r?\n> ")
        # A wide character is deleted as one.
        terminal.type("/错误" + BACKSPACE * 2 + "了\n")
        terminal.expect(r"error: there is no /了; /help shows what there is\r?\n> ")
        # The line before comes back.
        terminal.type("\x1b[A\n")
        terminal.expect(r"error: there is no /了")
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.status() == 0
    history = tmp_path / "state" / "mini-infer" / "chat_history"
    kept = history.read_text(encoding="utf-8")
    assert "什么是预填充？" in kept and "/了" in kept and "forget" not in kept
    assert os.stat(history).st_mode & 0o077 == 0, "only its owner may read it"


def test_there_is_no_history_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    chat("/help\n")
    assert list(tmp_path.iterdir()) == []


def test_tools_of_a_file(tmp_path: Path) -> None:
    """Each call is shown with its result; what the functions of a file are is read from their docstrings."""
    file = tmp_path / "tools.py"
    file.write_text(
        'import os\n\n\ndef add(a: int, b: int) -> int:\n    """Add two numbers.\n\n    Args:\n        a: one\n'
        '        b: another\n    """\n    return a + b\n\n\ndef _own() -> None: ...\n'
    )
    tools = Functions.of_file(file)
    assert [tool.name for tool in tools.tools] == ["add"]
    assert tools.tools[0].schema["required"] == ["a", "b"]
    assert tools.call("add", '{"a": 2, "b": 3}') == "5"
    assert tools.call("add", "{").startswith("error: ") and "no function" in tools.call("x", "{}")
    for text, words in (("x = 1", "no functions"), ("def f(x): ...", "cannot be a tool"), ("1 / 0", "ZeroDivision")):
        file.write_text(text)
        with pytest.raises(InvalidRequestError, match=words):
            Functions.of_file(file)


def test_the_tutor_calls_the_functions_of_a_file() -> None:
    done = chat(
        "How many blocks do 1000 tokens need with a block size of 16?\n查一下连续批处理。\n",
        "--tools",
        str(ROOT / "examples" / "tools.py"),
    )
    blocks, term = done.stdout.splitlines()
    assert "63" in blocks and "每一步" in term
    assert 'count_blocks({"tokens": 1000, "block_size": 16}) = 63\n' in done.stderr
    assert 'lookup_term({"term": "连续批处理"}) = ' in done.stderr
