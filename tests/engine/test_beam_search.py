"""Beam search equals transformers' own, whatever the memory and the budget (float64).

The reference computes in float64 throughout (see `reference_model`), but its scores are float32. So where two
completions score within 1e-6 of each other either may come; such places are counted, and printed when the module ends.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from transformers import PreTrainedModel

from mini_infer import LLM, GenerateOutput, SamplingParams
from mini_infer.engine import EngineStats
from mini_infer.exceptions import InvalidRequestError, NotFiniteError
from mini_infer.scheduler import Outcome, Scheduler, Sequence
from mini_infer.step import StepInput, StepOutput
from tests.engine.checkpoints import EOS, VOCAB_SIZE, make_engine_checkpoint
from tests.engine.executors import Corrupting, Failing, interpose, with_nan
from tests.models.checkpoints import VARIED_FAMILIES
from tests.models.test_decoder import reference_model

MAX_LEN = 64
NEAR_TIE = 1e-6
STOP_TOKENS = sorted({EOS, *range(0, VOCAB_SIZE, 9)})  # the tokenizer's own end counts as well
"""One token in nine ends a completion, so that most beams meet one soon."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that hardly ever stops, the same one with ``STOP_TOKENS``, and transformers' model of both."""

    path: Path
    stopping_path: Path
    reference: PreTrainedModel

    def engine(self, *, stopping: bool = False, **fields: Any) -> LLM:
        path = self.stopping_path if stopping else self.path
        return LLM(path, **{"dtype": "float64", "max_model_len": MAX_LEN, "block_size": 4, **fields})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """By family."""
    made = {}
    for family in VARIED_FAMILIES:
        paths = [tmp_path_factory.mktemp(f"{family}-{name}") for name in ("plain", "stopping")]
        options: dict[str, Any] = {"seed": 3, "num_hidden_layers": 2}
        make_engine_checkpoint(paths[0], family, **options)
        make_engine_checkpoint(paths[1], family, **options, eos_token_id=STOP_TOKENS)
        made[family] = Checkpoint(paths[0], paths[1], reference_model(paths[0], torch.float64))
    return made


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, Checkpoint], request: pytest.FixtureRequest) -> Checkpoint:
    """One that has a sliding window; a test may be parametrised by another family."""
    return checkpoints[getattr(request, "param", "mistral")]


each_family = pytest.mark.parametrize("checkpoint", VARIED_FAMILIES, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Counts over the whole module, printed when it ends, also when pytest captures output."""
    counts: Counter[str] = Counter()
    yield counts
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\nbeam search: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))


@dataclass(frozen=True)
class Case:
    """Prompts, and how to search for their completions."""

    prompts: list[list[int]]
    beam_width: int
    max_tokens: int
    stopping: bool
    length_penalty: float
    early_stopping: bool


def draw_case(draw: random.Random, num_prompts: int = 1) -> Case:
    stem = [draw.randrange(256) for _ in range(24)]
    return Case(
        prompts=[
            stem[: draw.choice([0, 0, 9, 24])] + [draw.randrange(256) for _ in range(draw.randint(1, 16))]
            for _ in range(num_prompts)
        ],
        beam_width=draw.randint(1, 5),
        max_tokens=draw.choice([1, 2, 3, 7, 12, 20]),
        stopping=draw.random() < 0.6,
        length_penalty=draw.choice([1.0, 1.0, 0.0, 2.0, -1.0]),
        early_stopping=draw.random() < 0.3,
    )


def search(engine: LLM, case: Case) -> list[GenerateOutput]:
    return engine.beam_search(
        case.prompts,
        case.beam_width,
        case.max_tokens,
        use_tqdm=False,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
    )


def expected_completions(model: PreTrainedModel, prompt: list[int], case: Case) -> list[tuple[list[int], float]]:
    """Tokens and scores of transformers' beam search. With one beam it decodes greedily and gives no score, which is
    then worked out from what it saw."""
    stop = STOP_TOKENS if case.stopping else [EOS]
    beams: dict[str, Any] = {"num_beams": case.beam_width, "num_return_sequences": case.beam_width}
    if case.beam_width > 1:
        beams |= {"length_penalty": case.length_penalty, "early_stopping": case.early_stopping}
    with torch.inference_mode():
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            eos_token_id=stop,
            pad_token_id=VOCAB_SIZE - 1,
            do_sample=False,
            max_new_tokens=min(case.max_tokens, MAX_LEN - len(prompt)),
            return_dict_in_generate=True,
            output_scores=True,
            **beams,
        )
    completions = []
    for row in result.sequences[:, len(prompt) :].tolist():
        end = next((place for place, token_id in enumerate(row) if token_id in stop), len(row) - 1)
        completions.append(row[: end + 1])
    if case.beam_width > 1:
        return list(zip(completions, result.sequences_scores.tolist(), strict=True))
    (tokens,) = completions
    logprobs = torch.cat(result.scores).double().log_softmax(dim=-1)
    total = sum(logprobs[place, token_id].item() for place, token_id in enumerate(tokens))
    return [(tokens, total / len(tokens) ** case.length_penalty)]


def check_outputs(outputs: list[GenerateOutput], case: Case, model: PreTrainedModel, tally: Counter[str]) -> None:
    """Tokens, scores and reasons are transformers'; its float32 may only exchange what scores the same."""
    stop = STOP_TOKENS if case.stopping else [EOS]
    for prompt, output in zip(case.prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        expected = expected_completions(model, prompt, case)
        tally["searches"] += 1
        for place, (completion, (tokens, score)) in enumerate(zip(output.outputs, expected, strict=True)):
            tally["completions"] += 1
            own_score = completion.cumulative_logprob / len(completion.token_ids) ** case.length_penalty
            assert own_score == pytest.approx(score, rel=1e-5)
            if completion.token_ids != tokens:
                tally["near ties"] += 1
                assert own_score == pytest.approx(score, abs=NEAR_TIE)
            assert completion.index == place
            assert completion.finish_reason == ("stop" if completion.token_ids[-1] in stop else "length")
            tally[f"ended by {completion.finish_reason}"] += 1


def assert_nothing_left(engine: LLM) -> None:
    stats = engine.stats()
    assert engine.is_finished()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks, stats.num_used_cpu_blocks) == (0, 0, 0, 0)
    assert not engine._loop.requests and not engine._finished


class MakeEngine(Protocol):
    def __call__(self, *, stopping: bool = False, **fields: Any) -> LLM: ...


@pytest.fixture
def make_engine(checkpoint: Checkpoint) -> MakeEngine:
    return checkpoint.engine


# ---- equal to transformers ---------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("num_cases", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_completions_are_those_of_transformers(
    checkpoint: Checkpoint, make_engine: MakeEngine, tally: Counter[str], num_cases: int
) -> None:
    engines = {stopping: make_engine(stopping=stopping) for stopping in (False, True)}
    for seed in range(num_cases):
        case = draw_case(random.Random(seed))
        check_outputs(search(engines[case.stopping], case), case, checkpoint.reference, tally)
    for engine in engines.values():
        assert_nothing_left(engine)


@pytest.mark.parametrize("beam_width", [2, 5])
@pytest.mark.parametrize("prompt_length", [1, MAX_LEN - 9, MAX_LEN - 1])
def test_the_shortest_and_the_longest_prompts(
    checkpoint: Checkpoint, make_engine: MakeEngine, tally: Counter[str], prompt_length: int, beam_width: int
) -> None:
    """A search is cut at ``max_model_len``."""
    case = Case([[17 + place for place in range(prompt_length)]], beam_width, 10, False, 1.0, False)
    outputs = search(make_engine(), case)
    check_outputs(outputs, case, checkpoint.reference, tally)
    assert max(len(completion.token_ids) for completion in outputs[0].outputs) <= MAX_LEN - prompt_length


# ---- under pressure ----------------------------------------------------------------------------------------------


def draw_tight_fields(draw: random.Random) -> dict[str, Any]:
    block_size = draw.choice([1, 2, 4, 8, 16])
    return {
        "block_size": block_size,
        "num_gpu_blocks": -(-MAX_LEN // block_size) + draw.randint(0, 24 // block_size),
        "num_cpu_blocks": draw.choice([3, 100 // block_size + 1]),
        "max_num_seqs": draw.randint(5, 8),
        "max_num_batched_tokens": draw.choice([1, 2, 3, 16, 64]),
        "enable_prefix_caching": draw.random() < 0.5,
        "preemption_mode": draw.choice(["recompute", "swap", "auto"]),
        "watermark": draw.choice([0.0, 0.01, 0.2]),
        "scheduling_policy": draw.choice(["fcfs", "priority"]),
    }


def check_under_pressure(checkpoint: Checkpoint, tally: Counter[str], seed: int) -> EngineStats:
    """Several searches in one batch, among requests that sample: nobody notices that memory is short."""
    draw = random.Random(seed)
    case = draw_case(draw, num_prompts=draw.randint(1, 4))
    fields = draw_tight_fields(draw)
    engine = checkpoint.engine(stopping=case.stopping, **fields)
    params = [SamplingParams(n=n, seed=n, max_tokens=16) for n in (1, 2, 3)]
    ids = [engine.add_request(case.prompts[0], own, priority=draw.randint(-1, 1)) for own in params]
    check_outputs(search(engine, case), case, checkpoint.reference, tally)
    sampled = []
    for request_id in ids:
        while (output := engine.get_output(request_id)) is None:
            pass
        sampled.append([completion.token_ids for completion in output.outputs])
    assert_nothing_left(engine)
    alone = checkpoint.engine(stopping=case.stopping)
    for own, tokens in zip(params, sampled, strict=True):
        (output,) = alone.generate([case.prompts[0]], own, use_tqdm=False)
        assert tokens == [completion.token_ids for completion in output.outputs]
    return engine.stats()


def check_seeds_under_pressure(checkpoints: list[Checkpoint], tally: Counter[str], seeds: range) -> None:
    """Each seed with the checkpoint whose turn it is."""
    stats = [check_under_pressure(checkpoints[seed % len(checkpoints)], tally, seed) for seed in seeds]
    assert sum(s.num_swap_preemptions for s in stats) > 0
    assert sum(s.num_recompute_preemptions for s in stats) > 0


def test_pressure_changes_nothing(checkpoints: dict[str, Checkpoint], tally: Counter[str]) -> None:
    check_seeds_under_pressure(list(checkpoints.values()), tally, range(16))


@each_family
@pytest.mark.slow
def test_pressure_changes_nothing_in_many_workloads(checkpoint: Checkpoint, tally: Counter[str]) -> None:
    check_seeds_under_pressure([checkpoint], tally, range(112))


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_beams_that_do_not_fit_together_take_turns(
    checkpoint: Checkpoint, make_engine: MakeEngine, tally: Counter[str], mode: str
) -> None:
    """The memory holds little more than one sequence of the longest length, and there are five of them."""
    case = Case([[5] * (MAX_LEN - 20)], 5, 20, False, 1.0, False)
    blocks = {"num_gpu_blocks": MAX_LEN // 4 + 1, "num_cpu_blocks": 40 if mode == "swap" else 0}
    engine = make_engine(**blocks, max_num_seqs=5, preemption_mode=mode)
    (output,) = outputs = search(engine, case)
    check_outputs(outputs, case, checkpoint.reference, tally)
    assert output.metrics.num_preemptions > 0
    assert_nothing_left(engine)


def test_a_fork_without_a_free_seat_waits() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_model_len=32, block_size=4)
    parent = Sequence("parent", [1, 2, 3, 4, 5], 5, 9, decides_late=True)
    other = Sequence("other", [1, 2, 3, 4, 5], 5, 9)
    scheduler.add(parent)
    scheduler.add(other)
    scheduler.schedule()
    scheduler.commit([Outcome(parent, (), 5), Outcome(other, (8,), 5)])
    child = Sequence("parent", [*parent.token_ids, 6], 5, 9, decides_late=True)
    scheduler.fork(parent, child)
    scheduler.commit([Outcome(parent, (7,), 5)])
    plan = scheduler.schedule()
    assert child not in [item.sequence for item in plan.scheduled]
    scheduler.finish(other, "abort")
    assert (child, 0, 6) in [item[:3] for item in scheduler.schedule().scheduled]


def test_beams_share_their_blocks(make_engine: MakeEngine) -> None:
    """A prompt of 15 full blocks is held once; each of four beams has one block or two of its own."""
    engine = make_engine(enable_prefix_caching=False)
    engine.beam_search([[7] * 60], 4, 4, use_tqdm=False)
    assert 15 + 4 <= engine.stats().peak_used_blocks <= 15 + 4 * 2


# ---- results -----------------------------------------------------------------------------------------------------


def test_outputs_look_like_those_of_generate(make_engine: MakeEngine) -> None:
    engine = make_engine(stopping=True)
    first, second = engine.beam_search(["Hello", "你好"], 3, 12)
    assert (first.prompt, second.prompt) == ("Hello", "你好")
    for output in (first, second):
        assert len(output.outputs) == 3
        assert output.text == output.outputs[0].text
        assert output.metrics.time_to_first_token is not None
        for completion in output.outputs:
            shown = [token_id for token_id in completion.token_ids if token_id not in STOP_TOKENS]
            text = engine._tokenizer.decode(output.prompt_token_ids + shown, skip_special_tokens=True)
            assert text.rstrip("\ufffd") == (output.prompt or "") + completion.text.rstrip("\ufffd")
    (alone,) = engine.beam_search("Hello", 3, 12)
    assert [completion.text for completion in alone.outputs] == [completion.text for completion in first.outputs]


def test_one_beam_is_greedy_decoding(make_engine: MakeEngine) -> None:
    engine = make_engine(stopping=True)
    prompts = [[n, 2 * n, 3 * n] for n in range(1, 9)]
    searched = engine.beam_search(prompts, 1, 16, use_tqdm=False)
    for output, greedy in zip(searched, engine.generate(prompts, temperature=0, max_tokens=16), strict=True):
        assert (output.token_ids, output.finish_reason) == (greedy.token_ids, greedy.finish_reason)
        assert output.cumulative_logprob == pytest.approx(greedy.cumulative_logprob)


def test_a_beam_wider_than_the_vocabulary_takes_all_of_it(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=VOCAB_SIZE + 10)
    (output,) = engine.beam_search([[1, 2, 3]], VOCAB_SIZE + 10, 1, use_tqdm=False)
    assert sorted(completion.token_ids for completion in output.outputs) == [
        [token_id] for token_id in range(VOCAB_SIZE)
    ]
    (output,) = engine.beam_search([[1, 2, 3]], VOCAB_SIZE + 10, 2, use_tqdm=False)
    assert len(output.outputs) == VOCAB_SIZE + 10
    assert_nothing_left(engine)


# ---- ends that were not planned ----------------------------------------------------------------------------------


def test_a_failed_step_is_repeated(
    checkpoint: Checkpoint, make_engine: MakeEngine, tally: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third step fails, and somebody else's polling goes on each time."""
    case = Case([[3, 1, 4, 1, 5], [9, 2, 6]], 4, 12, False, 1.0, False)
    engine = make_engine(num_gpu_blocks=24)
    interpose(engine, lambda executor: Failing(executor, lambda n, _: RuntimeError("lost") if n % 3 == 2 else None))
    advance = engine._loop.advance

    def patient() -> Any:
        while True:
            try:
                return advance()
            except RuntimeError:
                tally["failed steps"] += 1

    monkeypatch.setattr(engine._loop, "advance", patient)
    check_outputs(search(engine, case), case, checkpoint.reference, tally)
    assert_nothing_left(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_an_exception_leaves_nothing_behind(make_engine: MakeEngine, num_steps: int) -> None:
    engine = make_engine()
    interpose(engine, lambda executor: Failing(executor, lambda n, _: KeyboardInterrupt() if n == num_steps else None))
    with pytest.raises(KeyboardInterrupt):
        engine.beam_search([[1, 2, 3], [4, 5]], 3, 20, use_tqdm=False)
    assert_nothing_left(engine)
    assert len(engine.beam_search([[1, 2, 3]], 3, 5, use_tqdm=False)[0].outputs) == 3


def assert_cut_off(output: GenerateOutput, reason: str, num_tokens: int) -> None:
    """The beams were cut off at this length; completions may have ended before it."""
    lengths = {reason: set[int](), "stop": set(), "length": set()}
    for completion in output.outputs:
        lengths[completion.finish_reason].add(len(completion.token_ids))
    assert len(output.outputs) == 3
    assert lengths[reason] == {num_tokens}
    assert max(lengths["stop"], default=0) <= num_tokens
    assert not lengths["length"]


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_aborted_search_gives_what_it_has(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    engine = make_engine()
    advance, steps = engine._loop.advance, iter(range(10**6))

    def then_abort() -> Any:
        result = advance()
        if next(steps) == num_steps:
            engine.abort(next(iter(engine._loop.requests)))
        return result

    monkeypatch.setattr(engine._loop, "advance", then_abort)
    first, second = engine.beam_search([[1, 2, 3], [4, 5, 6]], 3, 20, use_tqdm=False)
    assert_cut_off(first, "abort", num_steps + 1)
    assert len(second.outputs) == 3
    assert all(completion.finish_reason != "abort" for completion in second.outputs)
    assert_nothing_left(engine)


def test_logits_that_are_not_finite_end_one_search(make_engine: MakeEngine) -> None:
    def poison(number: int, step: StepInput, output: StepOutput) -> StepOutput:
        return with_nan(output, 0) if number == 2 else output

    engine = make_engine()
    interpose(engine, lambda executor: Corrupting(executor, poison))
    first, second = engine.beam_search([[1, 2, 3], [4, 5, 6]], 3, 8, use_tqdm=False)
    assert_cut_off(first, "error", 2)
    assert isinstance(first.error, NotFiniteError)
    assert second.error is None
    assert all(completion.finish_reason in ("stop", "length") for completion in second.outputs)
    assert_nothing_left(engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_width": 0}, "beam_width must be an integer from 1 to 8, got 0"),
        ({"beam_width": 9}, "beam_width must be an integer from 1 to 8, got 9"),
        ({"beam_width": True}, "beam_width"),
        ({"beam_width": 2.0}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": None}, "max_tokens"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"early_stopping": "never"}, "early_stopping must be True or False, got 'never'"),
        ({"prompts": None}, "prompts must be a string"),
        ({"prompts": ""}, "is empty"),
        ({"prompts": [[1, 2], []]}, r"prompts\[1\]: prompt \[\] is empty"),
        ({"prompts": [[1, 2], [VOCAB_SIZE]]}, r"prompts\[1\]: token 0 of the prompt"),
        ({"prompts": [[1] * MAX_LEN]}, "leaves no room"),
    ],
)
def test_bad_input_is_refused(make_engine: MakeEngine, arguments: dict[str, Any], message: str) -> None:
    engine = make_engine(max_num_seqs=8)
    with pytest.raises(InvalidRequestError, match=message):
        engine.beam_search(**{"prompts": [[1, 2]], "beam_width": 2, "max_tokens": 4, **arguments})
    assert_nothing_left(engine)


def test_no_prompts_give_no_outputs(make_engine: MakeEngine) -> None:
    assert make_engine().beam_search([], 2, 4) == []
