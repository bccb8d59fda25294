"""The canvas of a diffusion model as it is told: after every step, to listeners and in the trace."""

import json
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from mini_infer import LLM, SamplingParams
from mini_infer.config import BUNDLED_MODEL
from mini_infer.engine.detokenizer import canvas_cells
from mini_infer.outputs import Increment
from tests.models.llada import make_llada_checkpoint

from .checkpoints import save_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_llada_checkpoint(tmp_path_factory.mktemp("llada"), 3)
    save_tokenizer(path)
    return path


def test_listeners_hear_of_every_step(path: Path) -> None:
    told: list[Increment] = []
    params = SamplingParams(temperature=0, gen_length=12, steps=6, block_length=6, ignore_eos=True)
    with LLM(path, device="cpu") as llm:
        request = llm.make_request([1, 2, 3], params, listener=told.append)
        llm.submit(request)
        while not request.finished:
            llm.step()
    canvases = [increment.canvas for increment in told]
    assert [canvas.count(None) for canvas in canvases] == [10, 8, 6, 4, 2, 0]
    for before, after in pairwise(canvases):
        assert all(old in (None, new) for old, new in zip(before, after, strict=True)), "a token changed"
    assert canvases[2][:6].count(None) == 0, "the first block comes first"
    assert list(canvases[-1]) == request.output().token_ids


def test_an_autoregressive_model_has_none() -> None:
    told: list[Increment] = []
    with LLM(BUNDLED_MODEL, dtype="float32", device="cpu") as llm:
        llm.submit(request := llm.make_request("Hi", SamplingParams(max_tokens=3), listener=told.append))
        while not request.finished:
            llm.step()
    assert [increment.canvas for increment in told] == [()] * len(told)


def test_cells_join_to_the_text_and_wait_for_whole_characters() -> None:
    draw = random.Random(7)
    text = "分页 KV 🦜 cache: 预填充"
    data = text.encode()
    for _ in range(50):  # tokens of one to three bytes, which part characters anywhere
        cuts = sorted({0, len(data), *draw.sample(range(len(data)), 20)})
        pieces = [data[start:end] for start, end in pairwise(cuts)]
        whole = canvas_cells(range(len(pieces)), pieces.__getitem__)
        assert "".join(cell for cell in whole if cell is not None) == text
        hidden = set(draw.sample(range(len(pieces)), 8))
        canvas = [None if place in hidden else place for place in range(len(pieces))]
        cells = canvas_cells(canvas, pieces.__getitem__)
        assert [cell is None for cell in cells] == [place in hidden for place in range(len(pieces))]
        bounds = [-1, *sorted(hidden), len(pieces)]
        for start, end in pairwise(bounds):
            run = b"".join(pieces[start + 1 : end]).decode(errors="replace")
            assert "".join(map(str, cells[start + 1 : end])) == run


def test_the_trace_says_what_each_step_wrote(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    params = SamplingParams(temperature=0.8, gen_length=20, steps=7, block_length=9, n=2, seed=3)
    with LLM(path, device="cpu", trace=file) as llm:
        outputs = llm.generate([[3, 4], [7] * 5], [params, SamplingParams(gen_length=8, ignore_eos=True)])
        token_bytes = llm.tokenizer.token_bytes
    events = json.loads(file.read_text(encoding="utf-8"))
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    written: dict[str, dict[int, str]] = defaultdict(dict)
    num_writes: dict[str, int] = defaultdict(int)
    for event in events:
        if event["ph"] == "i" and event["name"] == "write":
            name = names[event["tid"]]
            num_writes[name] += 1
            written[name] |= event["args"]["cells"]
    for output in outputs:
        for place, completion in enumerate(output.outputs):
            name = output.request_id + (f" #{place}" if place else "")
            expected = canvas_cells(completion.token_ids, token_bytes)
            assert [written[name][i] for i in range(len(expected))] == expected
    assert num_writes[outputs[1].request_id] == 8
