"""A step that goes wrong, wherever it does: whoever is to blame ends with that error, and nobody else notices."""

import itertools
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_infer import LLM, GenerateOutput, LLMEngine, SamplingParams
from mini_infer.engine.detokenizer import Detokenizer
from mini_infer.exceptions import EngineError, NotFiniteError, RequestError
from mini_infer.outputs import Increment
from tests.engine.checkpoints import make_engine_checkpoint
from tests.engine.executors import Failing, Passing, interpose
from tests.engine.stand_in import completions_alone, make_stand_in_engine

DEPTHS = (1, 2, 3, 4)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(params=DEPTHS, ids="depth {}".format)
def llm(request: pytest.FixtureRequest, checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float64", block_size=4, overlap=request.param)


def finish(engine: LLMEngine) -> None:
    """Step until nothing is left; it must not take for ever."""
    for _ in range(500):
        if engine.is_finished():
            break
        engine.step()
    assert engine.is_finished(), "it waits for ever"
    assert_empty(engine)


def assert_empty(engine: LLMEngine) -> None:
    stats = engine.stats()
    assert engine.is_finished()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks, stats.num_used_cpu_blocks) == (0, 0, 0, 0)
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def output_of(engine: LLMEngine, request_id: str) -> GenerateOutput:
    output = engine.get_output(request_id)
    assert output is not None
    return output


class Listener:
    """Keeps what it is told, and does something at the n-th time."""

    def __init__(self, at: int, do: Callable[[Increment], None]) -> None:
        self.heard: list[Increment] = []
        self._at, self._do = at, do

    def __call__(self, increment: Increment) -> None:
        self.heard.append(increment)
        if len(self.heard) == self._at:
            self._do(increment)


def fail(error: BaseException) -> Callable[[Any], None]:
    def do(_: Any) -> None:
        raise error

    return do


@pytest.mark.parametrize("at", [1, 4, 10])
@pytest.mark.parametrize("error", [RuntimeError("deaf"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_a_listener_that_raises_ends_its_own_request(llm: LLM, error: BaseException, at: int) -> None:
    """One that asks the program to end is heard, but not before the others are told of the step."""
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = [output.token_ids for output in llm.generate(prompts, GREEDY)]
    before = llm.add_request(prompts[0], GREEDY)
    listener = Listener(at, fail(error))
    raising = llm.make_request(prompts[1], GREEDY, listener=listener)
    llm.submit(raising)
    after = llm.add_request(prompts[2], GREEDY)
    if isinstance(error, Exception):
        finish(llm)
    else:
        with pytest.raises(type(error)):
            finish(llm)
        finish(llm)
    assert [output_of(llm, request_id).token_ids for request_id in (before, after)] == [expected[0], expected[2]]
    assert [token for heard in listener.heard for token in heard.token_ids][:at] == expected[1][:at]
    assert raising.finished and isinstance(raising.error, RequestError) and raising.error.__cause__ is error
    if at < 10:
        assert raising.output().finish_reason == "error"


@pytest.mark.parametrize(("at", "stop"), [(1, ["never said"]), (3, ["never said"]), (8, ["never said"]), (1, [])])
def test_a_tokenizer_that_raises_ends_the_request_that_it_reads(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, at: int, stop: list[str]
) -> None:
    """Each token of it as it comes, to look for stop strings; or all of them at the end."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop=stop)
    expected = llm.generate([[1, 2, 3], [6]], params)
    decode, calls = llm._tokenizer.decode, itertools.count()

    def raises(*args: Any, **more: Any) -> str:
        if next(calls) == 2 * at:
            raise UnicodeError("unreadable")
        return decode(*args, **more)

    monkeypatch.setattr(llm._tokenizer, "decode", raises)
    outputs = llm.generate([[1, 2, 3], [6]], params)
    reasons = [output.finish_reason for output in outputs]
    assert sorted(reasons) == ["error", "length"]
    place = reasons.index("length")
    assert outputs[place].token_ids == expected[place].token_ids and outputs[place].text == expected[place].text
    error = outputs[1 - place].error
    assert isinstance(error, RequestError) and isinstance(error.__cause__, UnicodeError)
    assert_empty(llm)


class Unreadable:
    """A decoder that gives up at its n-th call, for good."""

    def __init__(self, at: int) -> None:
        self._calls_left = at

    def __call__(self, token_ids: Sequence[int]) -> str:
        self._calls_left -= 1
        if self._calls_left < 0:
            raise UnicodeError("unreadable")
        return "".join(chr(ord("a") + token_id % 26) for token_id in token_ids)


@pytest.mark.parametrize("at", [4, 7, 10])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_tokenizer_that_goes_on_raising_ends_the_request_that_it_reads(
    monkeypatch: pytest.MonkeyPatch, depth: int, n: int, at: int
) -> None:
    """Its listener hears of the end, all its sequences end, and the engine goes on."""
    engine = make_stand_in_engine(depth)
    params = SamplingParams(max_tokens=6, seed=3, n=n, ignore_eos=True)
    staying = engine.add_request([4, 5], params)
    monkeypatch.setattr(engine._tokenizer, "detokenizer", lambda prompt, skip: Detokenizer(Unreadable(at), prompt))
    listener = Listener(0, fail(AssertionError()))
    request = engine.make_request([1, 2, 3], params, listener=listener)
    engine.submit(request)
    finish(engine)
    assert isinstance(request.error, RequestError) and isinstance(request.error.__cause__, UnicodeError)
    last = listener.heard[-1]
    assert last.finish_reason == "error" and last.output is not None and last.output.error is request.error
    assert sum(heard.finish_reason is not None for heard in listener.heard) == n
    got = [(c.token_ids, c.finish_reason) for c in output_of(engine, staying).outputs]
    assert got == [alone[:2] for alone in completions_alone([4, 5], params, 64)]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_beams_whose_text_cannot_be_read_end_with_what_was_read(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    engine = make_stand_in_engine()
    (expected,) = engine.beam_search([[1, 2, 3]], 3, 6)
    monkeypatch.setattr(engine._tokenizer, "detokenizer", lambda prompt, skip: Detokenizer(Unreadable(at), prompt))
    (output,) = engine.beam_search([[1, 2, 3]], 3, 6)
    assert output.error is not None
    for ours, theirs in zip(output.outputs, expected.outputs, strict=True):
        assert ours.finish_reason == "error"
        assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
    assert_empty(engine)


def test_a_step_that_is_computed_again_reports_its_log_probabilities_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails behind the draw of tokens, where the likeliest are looked for, for one of the requests or the other."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    (expected,) = llm.generate([[1, 2, 3]], params)
    topk = torch.Tensor.topk
    for failing in range(1, 9):
        request_id, calls = llm.add_request([1, 2, 3], params), itertools.count()

        def raises(self: torch.Tensor, *args: Any, calls: Any = calls, failing: int = failing, **more: Any) -> Any:
            if next(calls) == failing:
                raise RuntimeError("lost")
            return topk(self, *args, **more)

        monkeypatch.setattr(torch.Tensor, "topk", raises)
        with pytest.raises(RuntimeError, match="lost"):
            llm.beam_search([[5, 6]], 2, 8, use_tqdm=False)
        finish(llm)
        output = output_of(llm, request_id)
        assert output.token_ids == expected.token_ids and output.logprobs is not None and expected.logprobs is not None
        assert len(output.logprobs) == 8
        assert output.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-12)
        for ours, theirs in zip(output.logprobs, expected.logprobs, strict=True):
            assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("overlap", DEPTHS)
def test_a_prompt_of_one_token_is_no_decode(checkpoint: Path, overlap: int) -> None:
    engine = LLM(checkpoint, block_size=4, overlap=overlap, enable_prefix_caching=True)
    engine.add_request([5], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [engine.step()[1] for _ in range(3)] == [1, -1, -1]
    # Nor is the one token that the prefix cache leaves.
    for expected in (9, 1):
        engine.add_request([7] * 9, SamplingParams(max_tokens=2, ignore_eos=True))
        assert [engine.step()[1] for _ in range(2)] == [expected, -1]
    assert engine.stats().num_decode_tokens == 4


@pytest.mark.parametrize("n", [1, 3])
def test_a_listener_may_abort_its_own_request_and_others(llm: LLM, n: int) -> None:
    expected = llm.generate([6], GREEDY)[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, n=n)
    others = [llm.add_request([8, 9], GREEDY, request_id=name) for name in ("before", "after")]

    def abort(increment: Increment) -> None:
        for request_id in ("mine", "before", "after"):
            llm.abort(request_id)

    listener = Listener(2 * n, abort)
    llm.submit(llm.make_request([1, 2, 3], params, request_id="mine", listener=listener))
    staying = llm.add_request([6], GREEDY)
    finish(llm)
    assert [heard.output.outputs[0].finish_reason for heard in listener.heard if heard.output] == ["abort"]
    assert [len(llm_output.token_ids) in (1, 2) for llm_output in (output_of(llm, name) for name in others)] == [
        True
    ] * 2
    assert output_of(llm, staying).token_ids == expected


def test_a_listener_that_runs_a_step_is_told_that_it_cannot(llm: LLM) -> None:
    expected = llm.generate([6], GREEDY)[0].token_ids
    staying = llm.add_request([6], GREEDY)
    request = llm.make_request([1, 2, 3], GREEDY, listener=Listener(3, lambda _: llm.step() and None))
    llm.submit(request)
    finish(llm)
    assert request.error is not None and isinstance(request.error.__cause__, EngineError)
    assert output_of(llm, staying).token_ids == expected


def test_a_listener_may_queue_another_request(llm: LLM) -> None:
    expected = llm.generate([6], GREEDY)[0].token_ids
    names: list[str] = []
    listener = Listener(3, lambda _: names.append(llm.add_request([6], GREEDY)))
    llm.submit(llm.make_request([1, 2, 3], GREEDY, listener=listener))
    finish(llm)
    assert output_of(llm, names[0]).token_ids == expected


def test_an_id_may_be_used_again_while_steps_of_its_last_owner_are_under_way(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in ([4, 5], [6])]
    for prompt, tokens in zip(([4, 5], [6]), expected, strict=True):
        llm.add_request([1, 2, 3], long, request_id="same")
        for _ in range(4):
            llm.step()
        llm.abort("same")
        assert len(output_of(llm, "same").token_ids) == 4
        llm.add_request(prompt, GREEDY, request_id="same")
        finish(llm)
        assert output_of(llm, "same").token_ids == tokens


@pytest.mark.parametrize("when_submitted", [False, True])
def test_an_executor_that_fails_for_good_says_so_each_time_and_lets_go(llm: LLM, when_submitted: bool) -> None:
    interpose(
        llm, lambda executor: Failing(executor, lambda n, _: OSError("unplugged") if n > 2 else None, when_submitted)
    )
    request_id = llm.add_request([1, 2, 3], GREEDY)
    seen = 0
    for _ in range(10):
        try:
            llm.step()
        except OSError:
            seen += 1
    assert seen >= 5
    llm.abort(request_id)
    assert output_of(llm, request_id).finish_reason == "abort"
    if not when_submitted:
        llm.step()  # what is under way fails, and nobody is interested
    assert_empty(llm)


class Undecided:
    """A policy that once has no key."""

    num_calls = 0

    def key(self, sequence: Any) -> tuple[float, ...]:
        self.num_calls += 1
        if self.num_calls == 3:
            raise LookupError("no key")
        return (sequence.arrival,)


def test_a_policy_that_raises_refuses_one_request() -> None:
    engine = make_stand_in_engine(max_num_seqs=1, scheduling_policy=Undecided())
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    staying = engine.add_request([5], params)
    with pytest.raises(LookupError, match="no key"):
        engine.add_request([1, 2], SamplingParams(n=3))  # for which there are no seats at once
    later = engine.add_request([6], params)
    finish(engine)
    for request_id, prompt in ((staying, [5]), (later, [6])):
        assert output_of(engine, request_id).token_ids == completions_alone(prompt, params, 64)[0][0]


class FailingToClose(Passing):
    def close(self) -> None:
        raise OSError("unplugged")


def test_an_engine_is_closed_even_if_its_device_fails() -> None:
    engine = make_stand_in_engine()
    interpose(engine, FailingToClose)
    engine.add_request([1, 2])
    with pytest.raises(OSError, match="unplugged"):
        engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.add_request([1, 2])
    assert_empty(engine)


def test_generate_beside_a_thread_that_steps() -> None:
    """Whoever runs the step in which a request ends, `generate` has its output."""
    engine = make_stand_in_engine()
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    stopping = threading.Event()

    def step() -> None:
        while not stopping.is_set():
            engine.step()

    thread = threading.Thread(target=step)
    thread.start()
    try:
        for place in range(100):
            prompt = [1, place % 30]
            (output,) = engine.generate([prompt], params, use_tqdm=False)
            assert output.token_ids == completions_alone(prompt, params, 64)[0][0]
    finally:
        stopping.set()
        thread.join()
    assert_empty(engine)


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def interrupt_at(line: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that sends SIGINT when Mini-Infer comes to its n-th line."""
    passed = itertools.count()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if "mini_infer" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(passed) == line:
            signal.raise_signal(signal.SIGINT)
        return trace

    return trace


def check_interruption(draw: random.Random) -> bool:
    """Ctrl-C at some line of `generate`, beside a request that somebody queued before. Whether it was raised."""
    depth = draw.choice(DEPTHS)
    fields: dict[str, Any] = {"num_blocks": 16, "num_cpu_blocks": 8, "preemption_mode": "swap", "max_num_seqs": 4}
    engine = make_stand_in_engine(depth, **fields, max_num_batched_tokens=10, enable_prefix_caching=draw.random() < 0.5)
    params = SamplingParams(max_tokens=6, seed=3, n=2, ignore_eos=True)
    queued = [engine.add_request([i, 2, 3], params) for i in range(3)]
    prompts = [[9, 8, 7, i] for i in range(3)]
    raised = False
    before = sys.gettrace()
    sys.settrace(interrupt_at(draw.randrange(9000)))
    try:
        engine.generate(prompts, params, use_tqdm=False)
    except KeyboardInterrupt:
        raised = True
    finally:
        sys.settrace(before)
    engine.stats()
    engine.snapshot()
    steps = 0
    while not engine.is_finished():
        engine.step()
        steps += 1
        assert steps < 200, "it waits for ever"
    for i, request_id in enumerate(queued):
        output = engine.get_output(request_id)
        assert output is not None
        got = [(c.token_ids, c.finish_reason) for c in output.outputs]
        assert got == [alone[:2] for alone in completions_alone([i, 2, 3], params, 64)]
    assert_empty(engine)
    assert not engine._finished
    for output in engine.generate(prompts, params, use_tqdm=False):
        got = [(c.token_ids, c.finish_reason) for c in output.outputs]
        assert got == [alone[:2] for alone in completions_alone(output.prompt_token_ids, params, 64)]
    return raised


def check_interruptions(seeds: range) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    raised = 0
    for seed in seeds:
        print("seed", seed)
        raised += check_interruption(random.Random(seed))
    assert raised > len(seeds) // 3


def test_ctrl_c_at_any_line_damages_nothing() -> None:
    check_interruptions(range(100))


@pytest.mark.slow
def test_ctrl_c_at_many_lines_damages_nothing() -> None:
    check_interruptions(range(100, 1300))


# ---- logits that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("overlap", [1, 3])
def test_keys_that_are_no_numbers_spoil_no_block_for_the_next_owner(tmp_path: Path, dtype: str, overlap: int) -> None:
    """A token whose embedding is NaN; the blocks that it filled are then given to others, longer ones among them."""
    path = make_engine_checkpoint(tmp_path, "qwen3", num_hidden_layers=2, tie_word_embeddings=False, head_dim=16)
    fields: dict[str, Any] = {"dtype": dtype, "block_size": 4, "num_gpu_blocks": 12, "max_model_len": 48}
    prompts = [[i, 2, 3][: i + 1] for i in range(3)]
    expected = [output.token_ids for output in LLM(path, **fields).generate(prompts, GREEDY)]
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][200] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    engine = LLM(path, overlap=overlap, **fields)
    for length in (46, 3, 9):
        outputs = engine.generate([[200] * length, *prompts], GREEDY, use_tqdm=False)
        assert isinstance(outputs[0].error, NotFiniteError) and outputs[0].token_ids == []
        assert outputs[0].finish_reason == "error"
        assert [output.token_ids for output in outputs[1:]] == expected
        assert [output.token_ids for output in engine.generate(prompts, GREEDY)] == expected
    assert_empty(engine)
