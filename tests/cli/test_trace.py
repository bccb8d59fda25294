"""``mini-infer trace`` draws every trace of an engine, at any width, and refuses everything else in one line."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from mini_infer import LLM, SamplingParams
from mini_infer.cli import app
from mini_infer.cli.trace import CACHED, FREE, SHARED, STATES, Blocks, TraceError, load_trace, show_trace
from mini_infer.engine import EngineStats
from tests.engine.checkpoints import make_engine_checkpoint

IDS = ["first", "second", "三号请求", "a request with quite a long name", "new\nline", "[bold]markup[/bold]", "last"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineStats]:
    """A trace of a small run with preemptions of both kinds, prefix hits and forks."""
    directory = tmp_path_factory.mktemp("trace")
    checkpoint = make_engine_checkpoint(directory / "model", num_hidden_layers=1)
    llm = LLM(
        checkpoint,
        trace=directory / "run.json",
        block_size=4,
        num_gpu_blocks=36,
        num_cpu_blocks=10,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        max_model_len=96,
        enable_prefix_caching=True,
        preemption_mode="swap",
    )
    for place, request_id in enumerate(IDS):
        prompt = list(range(24 * (place % 2))) + list(range(100, 106 + 3 * place))
        params = SamplingParams(n=3 if place == 1 else 1, seed=place, max_tokens=10 + 4 * place, ignore_eos=True)
        llm.add_request(prompt, params, request_id=request_id)
        llm.step()
    while not llm.is_finished():
        llm.step()
    return directory / "run.json", llm.stats()


def draw(path: Path, width: int, max_rows: int = 40) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    show_trace(path, console, max_rows)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def timeline(text: str) -> list[str]:
    """The lines of the timeline's rows."""
    lines = text.split("Timeline", 1)[1].split("Block map", 1)[0].splitlines()
    return [line for line in lines if re.search(r" \d+\+(\d+|\?) (length|stop|abort|\.\.\.)$", line)]


@pytest.mark.parametrize("width", [80, 100, 160, 250])
def test_it_fits_the_terminal_and_shows_every_sequence(run: tuple[Path, EngineStats], width: int) -> None:
    text = draw(run[0], width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    rows = timeline(text)
    names = {row[2:18].rstrip() for row in rows}
    assert {"first", "second", "second #1", "second #2", "a reque…ong name", "new?line", "[bold]m…p[/bold]"} <= names
    assert sum("三号请求" in name for name in names) == 1
    assert len(rows) == len(IDS) + 2
    assert [row[0] for row in rows] == list("ABCDEFGHI")


def test_a_tiny_window_is_no_error(run: tuple[Path, EngineStats]) -> None:
    assert "Block map" in draw(run[0], 20)


def test_the_totals_are_those_of_the_engine(run: tuple[Path, EngineStats]) -> None:
    path, stats = run
    lines = draw(path, 160).split("Timeline")[0].splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in lines if line.startswith("│")]
    values = {label.split(" · ")[0]: value for label, value in cells}
    assert values["steps"] == str(stats.num_steps)
    assert values["prompt, decode tokens computed"] == f"{stats.num_prompt_tokens}, {stats.num_decode_tokens}"
    assert values["tokens generated"] == str(stats.num_generated_tokens)
    preemptions = f"{stats.num_swap_preemptions}, {stats.num_recompute_preemptions}"
    assert values["preempted: swap, recompute"] == preemptions
    assert stats.num_swap_preemptions and stats.num_recompute_preemptions
    assert values["forks, blocks copied on write"].startswith("2, ")
    shares = [int(value.split("%")[0]) for label, value in values.items() if "%" in value]
    assert len(shares) == 4 and abs(sum(shares) - 100) <= 3


def test_columns_show_what_ran(run: tuple[Path, EngineStats]) -> None:
    """With a column for each step, every prompt chunk and every decode is one mark."""
    path, stats = run
    rows = {row[2:18].rstrip(): row[19:] for row in timeline(draw(path, 250))}
    steps = [e["args"]["ran"] for e in json.loads(path.read_text()) if e["ph"] == "X" and e["name"] == "step"]
    assert len(steps) == stats.num_steps
    for name in ("first", "second", "second #1", "second #2", "last"):
        ran = [step.get(name, 0) for step in steps]
        marks = rows[name].ljust(stats.num_steps)
        assert [mark in "P=" for mark in marks[: stats.num_steps]] == [num_tokens > 0 for num_tokens in ran]
        assert all(mark == "P" for mark, num_tokens in zip(marks, ran, strict=False) if num_tokens > 1)


def test_each_state_can_be_told_without_colours(run: tuple[Path, EngineStats]) -> None:
    text = draw(run[0], 250)
    marks = set("".join(row[19:].rsplit(" ", 2)[0] for row in timeline(text)))
    assert {STATES[state].mark for state in ("swapped", "preempted", "prompt", "decode", "waiting")} <= marks
    for look in (*STATES.values(), SHARED, CACHED, FREE):
        assert f"{look.mark}  {look.label}" in text
    assert len({look.mark for look in STATES.values()}) == len(STATES)


def test_block_maps_agree_with_the_counters(run: tuple[Path, EngineStats]) -> None:
    path, stats = run
    trace = load_trace(path)
    # After a step is planned, and again after it, its counters are written.
    counters = [e["args"] for e in json.loads(path.read_text()) if e["ph"] == "C" and e["name"] == "blocks"][::2]
    blocks = Blocks()
    shared = 0
    for counter, _ in zip(counters, blocks.replay(trace), strict=True):
        looks = blocks.draw(trace.num_blocks, {row.name: row.look for row in trace.rows})
        num_cached, num_free = looks.count(CACHED), looks.count(FREE)
        assert {"used": trace.num_blocks - num_cached - num_free, "cached": num_cached, "free": num_free} == counter
        shared = max(shared, looks.count(SHARED))
    assert shared > 2
    assert f"peak · 峰值: {stats.peak_used_blocks} of {stats.num_blocks} used" in draw(path, 80)


def test_many_sequences_are_cut_short_on_request(run: tuple[Path, EngineStats]) -> None:
    text = draw(run[0], 80, max_rows=4)
    assert len(timeline(text)) == 4
    assert "... and 5 more sequences" in text


def test_a_big_pool_is_drawn_small(tmp_path: Path, run: tuple[Path, EngineStats]) -> None:
    path = tmp_path / "big.json"
    path.write_text(run[0].read_text().replace('"blocks":36', '"blocks":100000'))
    text = draw(path, 80)
    assert "A cell is 214 blocks" in text
    assert len(text.splitlines()) < 80


def test_a_run_that_was_killed_is_drawn_up_to_there(tmp_path: Path, run: tuple[Path, EngineStats]) -> None:
    whole = run[0].read_text().removesuffix("\n]\n")
    path = tmp_path / "killed.json"
    middle = whole.index('{"ph":"X","name":"step"', len(whole) // 2)
    ends = [place for place in range(middle, middle + 2000) if place % 97 == 0 or whole[place] == "\n"]
    for end in ends:
        path.write_text(whole[:end])
        text = draw(path, 80)
        assert "has no end" in text
        assert any(row.endswith("+? ...") for row in timeline(text))
    path.write_text(whole)
    assert load_trace(path).broken_off
    assert len(load_trace(path).steps) == run[1].num_steps
    path.write_text(whole + "\n]\n")
    assert "has no end" not in draw(path, 80)


def test_a_trace_without_steps_is_no_error(tmp_path: Path, run: tuple[Path, EngineStats]) -> None:
    path = tmp_path / "idle.json"
    path.write_text("\n".join(run[0].read_text().splitlines()[:7]).rstrip(",") + "\n]\n")
    assert "steps" in draw(path, 80)


def test_the_command_draws(run: tuple[Path, EngineStats]) -> None:
    result = CliRunner().invoke(app, ["trace", str(run[0]), "--rows", "3"])
    assert result.exit_code == 0
    assert "Timeline" in result.output


FOREIGN = {
    "empty": "",
    "text": "hello",
    "number": "7",
    "object": '{"traceEvents": []}',
    "list": "[]",
    "numbers": "[1, 2]",
    "other tracer": '[{"ph": "X", "name": "f", "ts": 1, "dur": 2, "pid": 1, "tid": 1}]',
    "no dimensions": '[{"ph": "i", "name": "mini-infer", "ts": 0, "pid": 1, "tid": 1, "args": {}}]',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(TraceError, match=r"other\.json' is not a trace of Mini-Infer"):
        load_trace(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x80\xff\x00")
    for name, reason in (("missing", "No such file"), (".", "Is a directory"), ("binary", "not text")):
        with pytest.raises(TraceError, match=reason):
            load_trace(tmp_path / name)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / ("[red]" + "x" * 120)
    result = CliRunner().invoke(app, ["trace", str(path)])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: cannot read") and str(path) in result.stderr
