"""The trace is well formed by the format's own rules, and says what happened."""

import json
import logging
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLM, SamplingParams
from mini_infer.engine import EngineStats
from mini_infer.exceptions import InvalidConfigError
from mini_infer.executor.runner import ModelRunner
from tests.engine.checkpoints import make_engine_checkpoint

Event = dict[str, Any]

STEM = list(range(24))
PHASES = ["schedule", "submit", "compute", "publish"]
FIELDS = {"X": {"dur"}, "B": set(), "E": set(), "i": {"s"}, "C": {"args"}, "M": {"args"}}
"""What each kind of event must have besides a name, a time, a process and a thread."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def make_llm(checkpoint: Path, trace: Path, **fields: Any) -> LLM:
    """An engine that soon runs out of blocks, and of CPU blocks too."""
    options: dict[str, Any] = {
        "num_gpu_blocks": 40,
        "num_cpu_blocks": 8,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
    }
    options |= {"block_size": 4, "max_model_len": 96, "enable_prefix_caching": True, "preemption_mode": "swap"}
    return LLM(checkpoint, trace=trace, **(options | fields))


def run_under_pressure(llm: LLM) -> EngineStats:
    """Some share a prefix, one forks twice in the middle of a block, all have too few blocks."""
    for place in range(9):
        prompt = STEM * (place % 2) + list(range(100 + 10 * place, 100 + 13 * place + 6))
        n = 3 if place == 1 else 1
        llm.add_request(prompt, SamplingParams(n=n, seed=place, max_tokens=10 + 4 * place, ignore_eos=True))
        llm.step()
    while not llm.is_finished():
        llm.step()
    return llm.stats()


@pytest.fixture(scope="module", params=[1, 3])
def pressured(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Event], EngineStats]:
    """With one step under way at a time, and with up to three."""
    path = tmp_path_factory.mktemp("trace") / "run.json"
    llm = make_llm(checkpoint, path, overlap=request.param)
    stats = run_under_pressure(llm)
    del llm  # which completes the file
    events = json.loads(path.read_text())
    check_format(events)
    return events, stats


def read(path: Path) -> list[Event]:
    """The events of a trace whose engine still lives."""
    events: list[Event] = json.loads(path.read_text() + "]")
    check_format(events)
    return events


def check_format(events: list[Event]) -> None:
    """The rules of the Trace Event Format, as far as these events use it."""
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        assert {"ph", "name", "ts", "pid", "tid"} | FIELDS[event["ph"]] <= set(event), event
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert math.isfinite(event["ts"]) and event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] == "t"
        if event["ph"] != "M":
            tracks[event["pid"], event["tid"]].append(event)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {track for track in tracks if track[1]} <= named  # counters belong to the process

    for track in tracks.values():
        slices = [event for event in track if event["ph"] == "X"]
        for kinds in ("X", "BEi", "C"):
            times = [event["ts"] for event in track if event["ph"] in kinds]
            assert times == sorted(times)
        open_ends: list[float] = []  # of the slices that the next one may lie in
        for event in slices:
            while open_ends and open_ends[-1] <= event["ts"] + 5e-4:
                open_ends.pop()
            assert event["dur"] >= 0
            assert not open_ends or event["ts"] + event["dur"] <= open_ends[-1] + 1e-3
            open_ends.append(event["ts"] + event["dur"])
        open_names: list[str] = []
        for event in track:
            if event["ph"] == "B":
                assert not open_names, "a sequence is in one state at a time"
                open_names.append(event["name"])
            elif event["ph"] == "E":
                assert open_names.pop() == event["name"]


def steps_of(events: list[Event], name: str = "step") -> list[Event]:
    return [event["args"] for event in events if event["ph"] == "X" and event["name"] == name]


def instants_of(events: list[Event]) -> Counter[str]:
    return Counter(event["name"] for event in events if event["ph"] == "i" and event["pid"] == 2)


def replay(events: list[Event]) -> list[tuple[dict[str, int], set[int]]]:
    """The block counters and, going by the tables, the blocks in use, wherever both are known."""
    sequences = [event for event in events if event["pid"] == 2]
    names = {event["tid"]: event["args"]["name"] for event in sequences if event["name"] == "thread_name"}
    tables: dict[str, list[int]] = {}
    found = []
    # A step begins before anything in it happens, and is written when it ends.
    for event in sorted((event for event in events if event["ph"] != "M"), key=lambda event: event["ts"]):
        name, args = names.get(event["tid"], ""), event.get("args", {})
        if event["ph"] == "X" and "block_tables" in args:
            for gone in args["preempted"]:
                tables[gone] = []
            tables |= args["block_tables"]
        elif event["pid"] == 2 and event["name"] == "fork":
            tables[name] = args["block_table"]
        elif event["pid"] == 2 and event["name"] in ("finish", "undone"):
            tables[name] = []
        elif event["ph"] == "C" and event["name"] == "blocks":
            found.append((args, {block for table in tables.values() for block in table}))
    return found


def test_totals_are_those_of_the_engine(pressured: tuple[list[Event], EngineStats]) -> None:
    events, stats = pressured
    steps = steps_of(events)
    assert [step["step"] for step in steps] == list(range(1, stats.num_steps + 1))
    assert sum(step["prompt_tokens"] for step in steps) == stats.num_prompt_tokens
    assert sum(step["decode_tokens"] for step in steps) == stats.num_decode_tokens
    assert sum(step["sampled"] for step in steps) == stats.num_generated_tokens
    assert sum(sum(step["ran"].values()) for step in steps) == stats.num_computed_tokens
    how = Counter(kind for step in steps for kind in step["preempted"].values())
    assert (how["swap"], how["recompute"]) == (stats.num_swap_preemptions, stats.num_recompute_preemptions)
    ends = [event["args"] for event in events if event["name"] == "finish"]
    assert sum(end["tokens"] for end in ends) == stats.num_generated_tokens


def test_everything_that_can_happen_is_there(pressured: tuple[list[Event], EngineStats]) -> None:
    events, stats = pressured
    steps, happened = steps_of(events), instants_of(events)
    assert happened["preempted: swap"] == stats.num_swap_preemptions > 0
    assert happened["preempted: recompute"] == stats.num_recompute_preemptions > 0
    assert (happened["fork"], happened["finish"]) == (2, 11)
    for kind in ("swap_out", "copy", "swap_in", "prefix_hits", "remembered"):
        assert any(step[kind] for step in steps), kind
    states = {event["name"] for event in events if event["ph"] == "B"}
    assert {"waiting", "prompt", "decode", "swapped", "preempted"} <= states
    chunks = [event["args"]["tokens"] for event in events if event["ph"] == "B" and event["name"] == "prompt"]
    assert sum(chunks) == stats.num_prompt_tokens
    phases = [event["name"] for event in events if event["ph"] == "X" and event["name"] != "step"]
    assert phases == PHASES * stats.num_steps


def test_prefix_hits_are_those_of_the_scheduler(checkpoint: Path, tmp_path: Path) -> None:
    llm = make_llm(checkpoint, tmp_path / "run.json", num_cpu_blocks=40)
    run_under_pressure(llm)
    hits = sum(sum(step["prefix_hits"].values()) for step in steps_of(read(tmp_path / "run.json")))
    assert hits == llm._loop.scheduler.counts.num_prefix_hits > 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_steps_under_way_together_overlap(checkpoint: Path, tmp_path: Path, depth: int) -> None:
    llm = make_llm(checkpoint, tmp_path / "run.json", overlap=depth)
    llm.generate([STEM], max_tokens=9, use_tqdm=False)
    slices = [event for event in read(tmp_path / "run.json") if event["ph"] == "X" and event["name"] == "step"]
    most = max(
        sum(other["ts"] <= one["ts"] < other["ts"] + other["dur"] for other in slices)  # when one begins
        for one in slices
    )
    assert most == depth
    assert {event["tid"] for event in slices} == set(range(1, depth + 1))


def test_beams_fork_and_end(checkpoint: Path, tmp_path: Path) -> None:
    llm = make_llm(checkpoint, tmp_path / "run.json", overlap=True)
    llm.beam_search([STEM, STEM[:9]], beam_width=3, max_tokens=8, use_tqdm=False)
    events = read(tmp_path / "run.json")
    happened = instants_of(events)
    assert happened["fork"] >= 4
    assert happened["finish"] == happened["fork"] + 2
    for counter, blocks in replay(events):
        assert counter["used"] == len(blocks)


def test_block_tables_replay_to_the_counters(pressured: tuple[list[Event], EngineStats]) -> None:
    events, stats = pressured
    moments = replay(events)
    assert len(moments) == 2 * stats.num_steps
    for counter, blocks in moments:
        assert counter["used"] == len(blocks)
        assert counter["used"] + counter["cached"] + counter["free"] == stats.num_blocks
    assert max(counter["used"] for counter, _ in moments) == stats.peak_used_blocks
    assert moments[-1][0]["used"] == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_failed_step_is_marked_and_does_not_count(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    llm = make_llm(checkpoint, tmp_path / "run.json", overlap=depth)
    for start in (0, 50):
        llm.add_request([*STEM, start], SamplingParams(max_tokens=9, ignore_eos=True))
    for _ in range(4):
        llm.step()
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "_forward", lambda self, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            for _ in range(depth):  # one may be computed already
                llm.step()
    while not llm.is_finished():
        llm.step()
    events = read(tmp_path / "run.json")
    failed = steps_of(events, "failed step")
    assert 1 <= len(failed) <= depth
    assert all("ZeroDivisionError" in step["error"] for step in failed)
    steps = steps_of(events)
    assert len(steps) == llm.stats().num_steps
    assert sum(sum(step["ran"].values()) for step in steps) == llm.stats().num_computed_tokens
    assert instants_of(events) == {"undone": 2, "finish": 2}
    for counter, blocks in replay(events):
        assert counter["used"] == len(blocks)


def test_aborted_requests_end_in_the_trace(checkpoint: Path, tmp_path: Path) -> None:
    llm = make_llm(checkpoint, tmp_path / "run.json", max_num_seqs=3)
    ids = [llm.add_request(STEM, SamplingParams(n=n, max_tokens=40, ignore_eos=True)) for n in (3, 2)]
    llm.step()
    for request_id in ids:
        llm.abort(request_id)
    llm.generate([STEM], max_tokens=2, use_tqdm=False)
    ends = Counter(event["args"]["reason"] for event in read(tmp_path / "run.json") if event["name"] == "finish")
    assert ends["abort"] == 4  # three that ran and one that waited; its fork never came to be
    assert sum(ends.values()) == 5


def test_a_stop_string_in_the_last_token_is_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    llm = make_llm(checkpoint, tmp_path / "run.json")
    params = SamplingParams(max_tokens=1, logit_bias={64: 100.0}, stop=["a"])
    (output,) = llm.generate([STEM], params, use_tqdm=False)
    ends = [event["args"]["reason"] for event in read(tmp_path / "run.json") if event["name"] == "finish"]
    assert ends == [output.finish_reason] == ["stop"]


def test_every_step_is_in_the_file_when_it_ends(checkpoint: Path, tmp_path: Path) -> None:
    llm = make_llm(checkpoint, tmp_path / "run.json")
    llm.add_request(STEM, SamplingParams(max_tokens=5, ignore_eos=True))
    for number in range(1, 6):
        llm.step()
        assert len(steps_of(read(tmp_path / "run.json"))) == number


def test_the_file_is_complete_when_the_process_ends(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from mini_infer import LLM\n"
        f"llm = LLM({str(checkpoint)!r}, trace={str(path)!r}, num_gpu_blocks=8, max_model_len=64)\n"
        "llm.generate([[1, 2, 3]], max_tokens=2, use_tqdm=False)\n"
        "llm.add_request([4, 5], request_id='never ran \\ud800')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    events = json.loads(path.read_text())
    check_format(events)
    assert any(event["args"].get("name") == "never ran \ud800" for event in events if event["ph"] == "M")


def test_an_engine_made_anew_has_the_file_to_itself(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    llm = make_llm(checkpoint, path)  # as when a notebook's cell runs twice
    llm.generate([STEM, STEM], max_tokens=20, use_tqdm=False)
    llm = make_llm(checkpoint, path)
    llm.generate([STEM], max_tokens=2, use_tqdm=False)
    assert len(steps_of(read(path))) == llm.stats().num_steps


def test_tracing_changes_no_token(checkpoint: Path, tmp_path: Path) -> None:
    prompts, params = [STEM, [7, 8, 9]], SamplingParams(n=2, seed=1, max_tokens=12, ignore_eos=True)
    plain = LLM(checkpoint, num_gpu_blocks=40, block_size=4, max_model_len=96).generate(prompts, params, use_tqdm=False)
    traced = make_llm(checkpoint, tmp_path / "run.json").generate(prompts, params, use_tqdm=False)
    assert [[c.token_ids for c in o.outputs] for o in plain] == [[c.token_ids for c in o.outputs] for o in traced]


@pytest.mark.parametrize("name", ["missing/run.json", ".", "bad\0name"])
def test_a_path_that_cannot_be_written_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(InvalidConfigError) as caught:
        LLM(checkpoint, trace=path)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("value", ["", 7])
def test_a_path_must_be_one(checkpoint: Path, value: Any) -> None:
    with pytest.raises(InvalidConfigError, match="trace must be a non-empty path"):
        LLM(checkpoint, trace=value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_ends_the_trace_and_nothing_else(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        llm = make_llm(checkpoint, Path("/dev/full"))
        (output,) = llm.generate([STEM], max_tokens=3, use_tqdm=False)
    assert output.finish_reason is not None
    assert [record.message for record in caplog.records] == [
        "trace '/dev/full' ends here: [Errno 28] No space left on device"
    ]
