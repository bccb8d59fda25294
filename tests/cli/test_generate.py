"""``mini-infer generate``: every way in, both ways out, and a file that is continued after anything."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mini_infer import LLM, SamplingParams
from mini_infer.cli import app
from mini_infer.cli.prompts import BadLine, Item, read_lines
from tests.cli.test_cli import ENTRY, ROOT
from tests.engine.checkpoints import make_engine_checkpoint

SMALL = ("--dtype", "float64", "--num-gpu-blocks", "200", "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1))


@pytest.fixture(scope="module")
def llm(checkpoint: str) -> LLM:
    return LLM(checkpoint, dtype="float64", num_gpu_blocks=200, device="cpu")


def generate(checkpoint: str, *arguments: str | Path, typed: str | bytes = "", status: int = 0) -> Result:
    words = ["generate", "--model", checkpoint, *SMALL, *map(str, arguments)]
    done = CliRunner().invoke(app, words, input=typed)
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done


def results(path: Path) -> dict[int, dict[str, Any]]:
    """The objects of a file, by index; each may be there once. Log probabilities, which vary in the last digit with
    the batch, are left out."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for completion in (completion for line in lines for completion in line.get("outputs", ())):
        del completion["cumulative_logprob"]
    by_index = {line["index"]: line for line in lines}
    assert len(by_index) == len(lines)
    return by_index


def test_a_json_schema(checkpoint: str, tmp_path: Path) -> None:
    schema, output = tmp_path / "schema.json", tmp_path / "out.jsonl"
    schema.write_text(json.dumps({"enum": [[1, "a"], {"好": None}]}), encoding="utf-8")
    generate(checkpoint, "x", "y", "--json-schema", schema, "-o", output, "--max-tokens", "40")
    assert all(json.loads(line["text"]) in ([1, "a"], {"好": None}) for line in results(output).values())
    lines = [{"prompt": "x", "max_tokens": 9, "structured_outputs": {"choice": ["one", "two"]}}]
    done = generate(checkpoint, "--jsonl", typed="\n".join(map(json.dumps, lines)))
    assert done.stdout.strip() in ("one", "two")
    schema.write_text('{"type": "tree"}', encoding="utf-8")
    assert "structured outputs" in generate(checkpoint, "x", "--json-schema", schema, status=2).stderr


# ---- in ----------------------------------------------------------------------------------------------------------


def test_arguments_a_file_and_a_pipe_mean_the_same(checkpoint: str, llm: LLM, tmp_path: Path) -> None:
    prompts = ["one", "第二个", "three, with\ttab"]
    texts = [output.text for output in llm.generate(prompts, max_tokens=9, temperature=0)]
    file = tmp_path / "提示词.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "one\r\n\n第二个\n   \nthree, with\ttab".encode())
    flags = ("--max-tokens", "9", "--temperature", "0", "--output", "-")
    for done in (
        generate(checkpoint, *prompts, *flags),
        generate(checkpoint, "--file", file, *flags),
        generate(checkpoint, *flags, typed=file.read_bytes()),
        generate(checkpoint, "-f", "-", *flags, typed=file.read_bytes()),
    ):
        lines = sorted(map(json.loads, done.stdout.splitlines()), key=lambda line: line["index"])
        assert [line["text"] for line in lines] == texts
        assert [line["prompt"] for line in lines] == prompts


def test_json_lines_bring_their_own_options(checkpoint: str, llm: LLM, tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "你好"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "max_tokens": 3},
        {"prompt_token_ids": [1, 2, 3], "temperature": 1.5, "seed": 7, "n": 2},
        {"messages": conversation, "stop_strings": "x", "logit_bias": {"5": -2, "6": 1.5}},
        {"prompt": "b", "max_tokens": None, "logprobs": 2, "prompt_logprobs": 0},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    generate(checkpoint, "--file", file, "-o", output, "--temperature", "0", "--max-tokens", "5")
    expected = llm.generate(
        ["a", [1, 2, 3], llm.render_chat(conversation), "b"],
        [
            SamplingParams(temperature=0, max_tokens=3),
            SamplingParams(temperature=1.5, seed=7, n=2, max_tokens=5),
            SamplingParams(temperature=0, max_tokens=5, stop="x", logit_bias={5: -2, 6: 1.5}),
            SamplingParams(temperature=0, max_tokens=None, logprobs=2, prompt_logprobs=0),
        ],
    )
    written = results(output)
    for index, (line, right) in enumerate(zip(lines, expected, strict=True)):
        got = written[index]
        kind = next(kind for kind in ("prompt", "prompt_token_ids", "messages") if kind in line)
        assert got[kind] == line[kind]
        assert (got["text"], got["token_ids"]) == (right.text, right.token_ids)
        assert (got["finish_reason"], got["num_prompt_tokens"]) == (right.finish_reason, len(right.prompt_token_ids))
    assert [completion["text"] for completion in written[1]["outputs"]] == [c.text for c in expected[1].outputs]
    assert len(written[3]["logprobs"]) == len(expected[3].token_ids) and len(written[3]["prompt_logprobs"]) == 1
    assert "outputs" not in written[0] and "logprobs" not in written[0]


BAD = {
    "not JSON: Expecting value at character 12": '{"prompt": }',
    "must be a JSON object": "[1, 2]",
    "must have one of prompt, prompt_token_ids, messages; it has none of them": '{"text": "hi"}',
    "it has prompt and messages": '{"prompt": "hi", "messages": []}',
    "prompt must be a str, got 7": '{"prompt": 7}',
    "messages must be a list, got 'hi'": '{"messages": "hi"}',
    "temperature must be a finite number of at least 0, got -1": '{"prompt": "hi", "temperature": -1}',
    "temperature must be a finite number of at least 0, got nan": '{"prompt": "hi", "temperature": NaN}',
    "no option 'temprature' (given: 1); did you mean 'temperature'?": '{"prompt": "hi", "temprature": 1}',
    "'stop' is given twice": '{"prompt": "hi", "stop": "a", "stop_strings": "b"}',
    "each key of logit_bias must be an integer": '{"prompt": "hi", "logit_bias": {"x": 1}}',
    "byte 14 is 0xff, which is not UTF-8": b'{"prompt": "a\xff"}',
    # These need the model.
    "prompt '' is empty": '{"prompt": ""}',
    "token 1 of the prompt is 9999, but the vocabulary": '{"prompt_token_ids": [3, 9999]}',
    "token 0 of the prompt must be an integer": '{"prompt_token_ids": ["a"]}',
    "lone surrogate": '{"prompt": "\\ud800"}',
    'a message must be {"role": str, "content": str}': '{"messages": [{"role": "user"}]}',
    "leaves no room to generate": json.dumps({"prompt_token_ids": [1] * 5000}),
}


@pytest.mark.parametrize(("reason", "line"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_is_named_and_nothing_runs(reason: str, line: str | bytes, checkpoint: str, tmp_path: Path) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(b'{"prompt": "fine"}\n\n' + bad + b'\n{"prompt": "fine, too"}\n')
    flags = ("--file", file, "--output", output, "--max-tokens", "2")
    error = generate(checkpoint, *flags, status=2).stderr
    assert error.startswith(f"error: {file}, line 3: ") and reason in error and error.count("\n") == 1
    assert not output.exists() or output.read_bytes() == b""
    done = generate(checkpoint, *flags, "--skip-bad", status=1)
    assert f"skipped: {file}, line 3: " in done.stderr and reason in done.stderr
    assert results(output).keys() == {0, 2}, "a bad line counts, so that the others keep their places"


def test_texts_after_a_skipped_one_are_printed(checkpoint: str, llm: LLM) -> None:
    """Whether it was found out while reading or by the model."""
    lines = [{"prompt": "a"}, {"prompt": ""}, {"prompt": 7}, {"prompt": "b"}]
    flags = ("--jsonl", "--skip-bad", "--max-tokens", "4", "--temperature", "0")
    done = generate(checkpoint, *flags, typed="\n".join(map(json.dumps, lines)), status=1)
    one, two = llm.generate(["a", "b"], max_tokens=4, temperature=0)
    assert done.stdout == f"[1] a\n{one.text}\n[4] b\n{two.text}\n"


def test_all_bad_lines_are_counted(checkpoint: str) -> None:
    error = generate(checkpoint, "--jsonl", typed='1\n{"prompt": "x"}\n2\n3\n', status=2).stderr
    assert "standard input, line 1: " in error and "(and 2 more)" in error


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "standard input holds no prompts"),
        (["--file", "missing.txt"], 1, "missing.txt: No such file or directory"),
        (["--file", "[red]:bug:.txt"], 1, "[red]:bug:.txt: No such file or directory"),
        (["--file", "."], 1, ".: Is a directory"),
        (["one", "--file", "x.txt"], 2, "give prompts either as arguments or with --file, not both"),
        (["one", "--output", "no/such/place.jsonl"], 1, "no/such/place.jsonl: No such file or directory"),
        ([""], 2, "prompt 1: prompt '' is empty"),
        (["one", "--min-tokens", "101"], 2, "prompt 1: min_tokens must be an integer from 0 to 100, got 101"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], status: int, message: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = generate(checkpoint, *arguments, status=status).stderr
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_random_bytes_are_lines_or_bad_lines() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        lines = [bytes(draw.choices(b'\xff\xe4\xbd\xa0{}[]":,\\ 1n\x00\r', k=draw.randrange(12))) for _ in range(20)]
        found = list(read_lines(iter(line + b"\n" for line in lines), "noise", jsonl=draw.random() < 0.5))  # type: ignore[arg-type]
        assert [item.index for item in found] == list(range(len(found))), seed
        assert all(isinstance(item, Item | BadLine) for item in found)


# ---- out ---------------------------------------------------------------------------------------------------------


def test_one_prompt_gives_its_text_and_nothing_else(checkpoint: str, llm: LLM) -> None:
    done = generate(checkpoint, "hello", "--max-tokens", "6", "--temperature", "0")
    assert done.stdout == llm.generate("hello", max_tokens=6, temperature=0)[0].text + "\n"
    assert done.stderr == ""


def test_several_texts_come_in_order_with_titles(checkpoint: str, llm: LLM, tmp_path: Path) -> None:
    """Also where later ones finish first."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"提示 {place}", "max_tokens": 40 - 10 * place} for place in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = generate(checkpoint, "--file", file, "--temperature", "0", "--n", "2", "--ignore-eos")
    params = [SamplingParams(temperature=0, n=2, ignore_eos=True, max_tokens=line["max_tokens"]) for line in lines]
    expected = llm.generate([line["prompt"] for line in lines], params)
    assert done.stdout == "".join(
        f"[{place + 1}.{index + 1}] {lines[place]['prompt']}\n{completion.text}\n"
        for place, output in enumerate(expected)
        for index, completion in enumerate(output.outputs)
    )


def test_a_text_that_the_default_limit_cut_short_is_mentioned(checkpoint: str) -> None:
    done = generate(checkpoint, "hello", "second", "--ignore-eos")
    assert done.stderr == "2 of 2 stopped after 100 tokens; see --max-tokens\n"


def test_results_are_utf8_as_it_is(checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "结果.jsonl"
    generate(checkpoint, "什么是 KV 缓存？😀", "-o", output, "--max-tokens", "2")
    assert "什么是 KV 缓存？😀" in output.read_text(encoding="utf-8") and b"\\u" not in output.read_bytes()


def test_a_short_queue_takes_them_all(checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    prompts = [f"prompt {place}" for place in range(12)]
    generate(checkpoint, *prompts, "-o", output, "--max-waiting", "2", "--max-num-seqs", "2", "--max-tokens", "3")
    assert sorted(results(output)) == list(range(12))


# ---- continued ---------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_run_again(checkpoint: str, tmp_path: Path) -> None:
    """With random tokens: what is left over comes out as it would have at once, wherever the file was cut."""
    prompts = [f"prompt {place}" for place in range(8)]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    flags = ("--temperature", "1", "--max-tokens", "8", "--n", "2")
    generate(checkpoint, *prompts, *flags, "-o", whole)
    content = whole.read_bytes()
    for cut in (0, 10, content.index(b"\n"), content.index(b"\n") + 1, len(content) // 2, len(content) - 1):
        output.write_bytes(content[:cut])
        done = generate(checkpoint, *prompts, *flags, "-o", output)
        assert output.read_bytes().startswith(content[: content.rfind(b"\n", 0, cut) + 1])
        assert results(output) == results(whole), cut
        num_there = content[:cut].count(b"\n")
        assert done.stderr == (f"{output} has {num_there} of 8 results already\n" if num_there else "")
    before = output.stat().st_mtime_ns
    generate("no/such/model/is/needed", *prompts, *flags, "-o", output, status=2)
    generate(checkpoint, *prompts, *flags, "-o", output)
    assert output.stat().st_mtime_ns == before and results(output) == results(whole)
    generate(checkpoint, *prompts, "a ninth", *flags, "-o", output)
    assert sorted(results(output)) == list(range(9)), "prompts may be added at the end"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, ["other", "two"], "line 1: the result of another prompt"),
        (None, ["one"], "line 2: the result of another prompt"),
        (
            None,
            ["one", "two", "--temperature", "0.5"],
            "line 1: the result of another prompt, or made by another model",
        ),
        (None, ["one", "two", "--seed", "5"], "line 1: the result of another prompt, or made by another model"),
        (b"hello\n", ["one"], "line 1: not a result of mini-infer generate"),
        (b'{"index": 0}\n', ["one"], "line 1: not a result of mini-infer generate"),
        (b"[]\n", ["one"], "line 1: not a result of mini-infer generate"),
        (b'{"index": [0], "key": "x"}\n', ["one"], "line 1: not a result of mini-infer generate"),
        (b"\xff\xfe\n", ["one"], "line 1: not a result of mini-infer generate"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(
    content: bytes | None, arguments: list[str], message: str, checkpoint: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    if content is None:
        generate(checkpoint, "one", "two", "--max-tokens", "2", "--max-num-seqs", "1", "-o", output)
        content = output.read_bytes()
    output.write_bytes(content)
    error = generate(checkpoint, *arguments, "--max-tokens", "2", "-o", output, status=2).stderr
    assert f"error: {output}, {message}" in error and error.count("\n") == 1
    assert output.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_an_output_that_is_no_file_is_only_written_to(checkpoint: str, tmp_path: Path) -> None:
    """A pipe is not read, and a device is not cut; both may have things of their own in them."""
    flags = ("one", "two", "--max-tokens", "2")
    whole, pipe = tmp_path / "whole.jsonl", tmp_path / "pipe"
    generate(checkpoint, *flags, "-o", whole)
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        generate(checkpoint, *flags, "-o", pipe)
        assert reader.stdout is not None and reader.stdout.read() == whole.read_bytes()
    assert generate(checkpoint, *flags, "-o", "/dev/null").stderr == ""
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "target.jsonl")
    for num_there in (0, 2):  # it is made, and then continued
        assert bool(generate(checkpoint, *flags, "-o", link).stderr) is (num_there > 0)
        assert (tmp_path / "target.jsonl").read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("output", ["/dev/full", "folder"])
def test_what_cannot_be_written_is_one_line(checkpoint: str, tmp_path: Path, output: str) -> None:
    output = str(tmp_path) if output == "folder" else output
    reason = "Is a directory" if output == str(tmp_path) else "No space left on device"
    done = generate(checkpoint, "one", "two", "--max-tokens", "2", "-o", output, status=1)
    assert done.stderr == f"error: {output}: {reason}\n"


# ---- as a process ------------------------------------------------------------------------------------------------


def start(checkpoint: str, *arguments: str | Path, **options: Any) -> "subprocess.Popen[bytes]":
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, "generate", "--model", checkpoint, *SMALL, *map(str, arguments)],
        env=os.environ | settings,
        stderr=subprocess.PIPE,
        **options,
    )


MANY = [f"prompt {place}" for place in range(160)]
OPTIONS = ("--temperature", "1", "--max-tokens", "60", "--ignore-eos")
SLOWLY = ("--max-num-seqs", "1", "--enforce-eager")
"""For the run that is stopped; what is left over, and the whole, come out the same at once."""


@pytest.fixture(scope="module")
def at_once(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The results of a run that nothing stops."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    generate(checkpoint, *MANY, *OPTIONS, "-o", output)
    return results(output)


@pytest.mark.parametrize("stopped_by", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_it_goes_on_after(
    stopped_by: signal.Signals, checkpoint: str, at_once: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    process = start(checkpoint, *MANY, *OPTIONS, *SLOWLY, "-o", output)
    deadline = time.monotonic() + 60
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"it ended by itself: {process.stderr and process.stderr.read()!r}")
    process.send_signal(stopped_by)
    _, error = process.communicate(timeout=60)
    num_done = output.read_bytes().count(b"\n")
    assert 2 <= num_done < len(MANY)
    if stopped_by is signal.SIGINT:
        assert process.returncode == 130
        assert error.decode() == f"interrupted; {num_done} of {len(MANY)} are done\n"
    done = generate(checkpoint, *MANY, *OPTIONS, "-o", output)
    assert done.stderr == f"{output} has {num_done} of {len(MANY)} results already\n"
    assert results(output) == at_once


def test_whoever_reads_may_leave(checkpoint: str, tmp_path: Path) -> None:
    """As with ``| head -1``."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {place}" for place in range(200)))
    process = start(checkpoint, "--file", prompts, "--max-num-seqs", "1", stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"[1] prompt 0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1
