"""Random faults: kernels, the executor, the tokenizer and listeners raise now and then, and nobody else notices.

Each workload draws an engine and requests of every kind. Whoever is not hit itself has the tokens and log probabilities
that it has alone (float64), every block is accounted for in the end, and nothing waits for ever.
"""

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLM, GenerateOutput, SamplingParams
from mini_infer.engine.detokenizer import TextStream
from mini_infer.engine.request import Request
from mini_infer.exceptions import RequestError
from mini_infer.kernels import OPS, register, registry
from mini_infer.outputs import Increment
from tests.engine.checkpoints import EOS, make_engine_checkpoint
from tests.engine.executors import Failing, interpose

MAX_LEN = 64
RATE = 0.03
BACKEND = "faulty"


class Fault(Exception):
    """What is raised here on purpose."""


class Dice:
    """Raises in so many of its calls, once it is armed. Calls are those of any thread."""

    def __init__(self, seed: int, rate: float) -> None:
        self._draw, self._rate = random.Random(seed), rate
        self._lock = threading.Lock()
        self.is_armed = False
        self.num_raised = 0

    def throw(self, what: str) -> None:
        with self._lock:
            if self.is_armed and self._draw.random() < self._rate:
                self.num_raised += 1
                raise Fault(what)


@dataclass
class Faults:
    """The dice of a workload.

    Attributes:
        kernels, executor: a step fails, and is computed again.
        tokenizer, listener: one request fails.
    """

    kernels: Dice
    executor: Dice
    tokenizer: Dice
    listener: Dice

    @classmethod
    def of(cls, seed: int) -> "Faults":
        # A step makes some 20 calls of kernels; it is the step that is to fail in 3 of 100 cases.
        rates = (RATE / 20, RATE, RATE / 4, RATE)
        return cls(*(Dice(4 * seed + place, rate) for place, rate in enumerate(rates)))

    def arm(self, armed: bool) -> None:
        for dice in (self.kernels, self.executor, self.tokenizer, self.listener):
            dice.is_armed = armed


current = Dice(0, 0.0)
"""What the faulty kernels throw; a registered kernel is a function of the process."""


@pytest.fixture(scope="module", autouse=True)
def faulty_kernels() -> Iterator[None]:
    """A backend whose every operation is the reference's, and throws the dice before that."""
    known = dict(registry._table)
    for op in OPS:
        if op in ("allocate_kv_cache", "attention"):  # the one is no part of a step, the other is made of two more
            continue
        reference = known[op, registry.REFERENCE, "any"].function

        def throws(*args: Any, op: str = op, reference: Callable[..., Any] = reference) -> Any:
            current.throw(op)
            return reference(*args)

        register(op, backend=BACKEND)(throws)
    yield
    registry._table.clear()
    registry._table.update(known)
    registry._resolve.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", seed=3, num_hidden_layers=1)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float64", max_model_len=MAX_LEN)


@dataclass
class Asked:
    """A request, and what became of it."""

    request: Request
    beam_width: int
    heard: list[Increment] = field(default_factory=list)
    was_hit: bool = False
    was_aborted: bool = False


def draw_engine(draw: random.Random, checkpoint: Path) -> LLM:
    block_size = draw.choice([1, 2, 4, 8])
    return LLM(
        checkpoint,
        dtype="float64",
        kernel_backend=BACKEND,
        overlap=draw.choice([1, 1, 2, 3, 4]),
        max_model_len=MAX_LEN,
        block_size=block_size,
        num_gpu_blocks=-(-MAX_LEN // block_size) + draw.randint(0, 16 // block_size),
        num_cpu_blocks=draw.choice([1, 4, 100 // block_size + 1]),
        max_num_seqs=draw.randint(4, 8),
        max_num_batched_tokens=draw.choice([2, 7, 16, 64]),
        enable_prefix_caching=draw.random() < 0.6,
        preemption_mode=draw.choice(["recompute", "swap", "auto"]),
        watermark=draw.choice([0.0, 0.01, 0.2]),
    )


def draw_params(draw: random.Random, looks_back: bool) -> SamplingParams:
    return SamplingParams(
        n=draw.choice([1, 1, 1, 2, 3]),
        temperature=draw.choice([0.0, 0.8, 1.5]),
        top_k=draw.choice([-1, 20]),
        top_p=draw.choice([1.0, 0.8]),
        seed=draw.randrange(1000),
        max_tokens=draw.choice([1, 2, *[draw.randint(3, 16)] * 4]),
        min_tokens=draw.choice([0, 0, 1]),
        ignore_eos=draw.random() < 0.5,
        stop_token_ids=draw.choice([None, [EOS, *range(30)]]),
        stop=draw.choice([None, None, ["a", "zq"]]),
        frequency_penalty=0.5 if looks_back and draw.random() < 0.4 else 0.0,
        logprobs=draw.choice([None, None, 1]),
        prompt_logprobs=draw.choice([None, None, None, 1]),
    )


def check_workload(checkpoint: Path, alone: LLM, seed: int) -> int:
    """One engine, until all its requests have ended. Gives how many faults there were."""
    global current
    draw, faults = random.Random(seed), Faults.of(seed)
    current = faults.kernels
    engine = draw_engine(draw, checkpoint)
    interpose(
        engine,
        lambda executor: Failing(executor, lambda *_: caught(faults.executor), when_submitted=draw.random() < 0.3),
    )
    asked = draw_requests(draw, engine, faults)
    faults.arm(True)
    to_come = list(asked)
    for num_steps in itertools.count():
        assert num_steps < 5000, f"seed {seed}: it waits for ever"
        while to_come and draw.random() < 0.7:
            engine.submit(to_come.pop(0).request)
        if draw.random() < 0.03 and len(asked) > len(to_come):
            leaving = draw.choice(asked[: len(asked) - len(to_come)])
            leaving.was_aborted |= not leaving.request.finished
            engine.discard([leaving.request])
        if engine.is_finished() and not to_come:
            break
        with contextlib.suppress(Fault):  # what a caller sees of a failed step, which is tried again
            engine.step()
        stats = engine.stats()
        assert stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks == stats.num_blocks
    faults.arm(False)
    while engine._loop.flights:  # what is left of those that ended early
        engine.step()
    stats = engine.stats()
    assert (stats.num_used_blocks, stats.num_used_cpu_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    for one in asked:
        check_request(alone, one, seed)
    return sum(d.num_raised for d in (faults.kernels, faults.executor, faults.tokenizer, faults.listener))


class FaultyText:
    """A text that may raise; some, once they did, always do."""

    def __init__(self, inner: TextStream, throw: Callable[[], None], breaks_for_good: bool) -> None:
        self._inner, self._throw, self._breaks_for_good = inner, throw, breaks_for_good
        self._is_broken = False

    def _throw_dice(self) -> None:
        if self._is_broken:
            raise Fault("tokenizer, again")
        try:
            self._throw()
        except Fault:
            self._is_broken = self._breaks_for_good
            raise

    def append(self, token_id: int, may_stop: bool) -> str:
        self._throw_dice()
        return self._inner.append(token_id, may_stop)

    def end(self) -> str:
        self._throw_dice()
        return self._inner.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def caught(dice: Dice) -> Fault | None:
    try:
        dice.throw("executor")
    except Fault as fault:
        return fault
    return None


def draw_requests(draw: random.Random, engine: LLM, faults: Faults) -> list[Asked]:
    """Requests whose texts and listeners may raise, which is noted; and sometimes beam searches."""
    looks_back, asked = draw.random() < 0.3, []
    stem = [7 * i % 256 for i in range(24)]
    for _ in range(draw.randint(5, 10)):
        prompt = stem[: draw.choice([0, 0, 9, 24])] + [draw.randrange(256) for _ in range(draw.randint(1, 16))]
        asked.append(ask(engine, faults, prompt, draw_params(draw, looks_back), draw.random() < 0.5))
    for _ in range(draw.choice([0, 0, 1, 2])):
        params = SamplingParams(n=draw.randint(1, 4), max_tokens=draw.randint(1, 8), temperature=0.0)
        search = engine._intake.make_beam_search([draw.randrange(256) for _ in range(9)], params, 1.0, False)
        asked.append(Asked(search, params.n))
    draw.shuffle(asked)
    return asked


def ask(engine: LLM, faults: Faults, prompt: list[int], params: SamplingParams, breaks_for_good: bool) -> Asked:
    def listen(increment: Increment) -> None:
        one.heard.append(increment)
        attempt(lambda: faults.listener.throw("listener"))

    def attempt(throw: Callable[[], None]) -> None:
        try:
            throw()
        except Fault:
            one.was_hit = True
            raise

    def throw() -> None:
        attempt(lambda: faults.tokenizer.throw("tokenizer"))

    one = Asked(engine.make_request(prompt, params, listener=listen), 0)
    for completion in one.request.completions:
        completion.stream = FaultyText(completion.stream, throw, breaks_for_good)  # type: ignore[assignment]
    return one


def check_request(alone: LLM, one: Asked, seed: int) -> None:
    request = one.request
    assert request.finished, seed
    output = request.output()
    told = [increment.output for increment in one.heard if increment.output is not None]
    assert len(told) == (0 if one.beam_width else 1), (seed, "a request is told of its end once")
    if one.was_hit:
        assert isinstance(output.error, RequestError) and isinstance(output.error.__cause__, Fault)
        return
    assert output.error is None, (seed, output.error)
    if one.was_aborted:
        return
    prompt = request.prompt_token_ids
    if one.beam_width:
        max_tokens = request.params.max_tokens
        assert max_tokens is not None
        (expected,) = alone.beam_search([prompt], one.beam_width, max_tokens, use_tqdm=False)
    else:
        (expected,) = alone.generate([prompt], request.params, use_tqdm=False)
        for completion in output.outputs:
            own = [increment for increment in one.heard if increment.index == completion.index]
            assert [token for each in own for token in each.token_ids] == completion.token_ids, seed
            assert "".join(each.text for each in own) == completion.text, seed
    assert_same(output, expected, seed)


def assert_same(output: GenerateOutput, expected: GenerateOutput, seed: int) -> None:
    for ours, theirs in zip(output.outputs, expected.outputs, strict=True):
        assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-8), seed
        assert_same_logprobs(ours.logprobs, theirs.logprobs)
    assert_same_logprobs(output.prompt_logprobs, expected.prompt_logprobs)


def assert_same_logprobs(ours: Any, theirs: Any) -> None:
    assert (ours is None) == (theirs is None)
    for place, expected in zip(ours or (), theirs or (), strict=True):
        assert (place is None) == (expected is None)
        for token_id, known in (expected or {}).items():
            assert place[token_id].logprob == pytest.approx(known.logprob, abs=1e-8)
            assert place[token_id].rank == known.rank


def check_workloads(checkpoint: Path, alone: LLM, seeds: range) -> None:
    counts = [check_workload(checkpoint, alone, seed) for seed in seeds]
    assert sum(counts) > 2 * len(seeds)  # the workloads are of no use if nothing goes wrong


def test_whoever_is_not_hit_notices_nothing(checkpoint: Path, alone: LLM) -> None:
    check_workloads(checkpoint, alone, range(50))


@pytest.mark.slow
def test_whoever_is_not_hit_notices_nothing_in_many_workloads(checkpoint: Path, alone: LLM) -> None:
    check_workloads(checkpoint, alone, range(50, 550))
