"""Reported log probabilities are log_softmax of transformers' logits, for generated tokens and for the prompt's."""

import copy
import gc
import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mini_infer import GenerateOutput, LLMEngine, SamplingParams
from mini_infer.engine.token_logprobs import PlaceLogprobs
from mini_infer.outputs import Logprob
from mini_infer.step import TokenScore
from tests.models.checkpoints import VARIED_FAMILIES
from tests.models.test_decoder import reference_model

from .checkpoints import VOCAB_SIZE, make_engine_checkpoint

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def make_engine(path: Path, dtype: torch.dtype = torch.float64, **fields: Any) -> LLMEngine:
    name = str(dtype).removeprefix("torch.")
    return LLMEngine(model=path, dtype=name, device="cpu", **{"num_gpu_blocks": 200, **fields})


def reference_logprobs(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """``[T, vocab]``: row i is about the token after the first i + 1, by one pass over all of them."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].double().log_softmax(dim=-1)


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def assert_place(
    engine: LLMEngine, place: Mapping[int, Logprob], token_id: int, expected: Tensor, num_top: int, tolerance: float
) -> None:
    """One reported place: the token that is there first, then the likeliest in order, each with its value and rank."""
    assert next(iter(place)) == token_id
    for entry_id, entry in place.items():
        value = expected[entry_id].item()
        assert entry.logprob == pytest.approx(value, abs=tolerance)
        # Tokens nearer to each other than the tolerance may have changed places.
        assert (expected > value + 2 * tolerance).sum() + 1 <= entry.rank <= (expected > value - 2 * tolerance).sum()
        assert entry.decoded_token == engine.tokenizer.hf.decode([entry_id])
    others = [entry.logprob for entry_id, entry in place.items() if entry_id != token_id]
    assert others == sorted(others, reverse=True)
    # With the first put in its place among them, the likeliest are all there.
    best = sorted((entry.logprob for entry in place.values()), reverse=True)[:num_top]
    assert best == pytest.approx(expected.topk(num_top).values.tolist(), abs=tolerance)
    is_likely = place[token_id].rank <= num_top
    assert len(place) == (num_top if is_likely else num_top + 1)


def assert_token_logprobs(
    engine: LLMEngine, model: PreTrainedModel, output: GenerateOutput, params: SamplingParams, tolerance: float
) -> None:
    prompt = output.prompt_token_ids
    for completion in output.outputs:
        tokens = completion.token_ids
        expected = reference_logprobs(model, prompt + tokens)[len(prompt) - 1 : -1]
        total = expected.gather(1, torch.tensor(tokens)[:, None]).sum().item()
        assert completion.cumulative_logprob == pytest.approx(total, abs=tolerance * len(tokens))
        if params.logprobs is None:
            assert completion.logprobs is None
            continue
        assert completion.logprobs is not None and len(completion.logprobs) == len(tokens)
        for place, token_id, row in zip(completion.logprobs, tokens, expected, strict=True):
            assert_place(engine, place, token_id, row, params.logprobs, tolerance)


def assert_prompt_logprobs(
    engine: LLMEngine, model: PreTrainedModel, output: GenerateOutput, num_top: int, tolerance: float = 1e-8
) -> None:
    prompt, places = output.prompt_token_ids, output.prompt_logprobs
    assert places is not None and len(places) == len(prompt)
    assert places[0] is None, "nothing precedes the first token"
    expected = reference_logprobs(model, prompt)
    for place, token_id, row in zip(places[1:], prompt[1:], expected, strict=False):
        assert place is not None
        assert_place(engine, place, token_id, row, num_top, tolerance)


# ---- generated tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pressure", ["roomy", "tight"])
@pytest.mark.parametrize("family", VARIED_FAMILIES)
def test_token_logprobs(tmp_path: Path, family: str, pressure: str, dtype: torch.dtype) -> None:
    """Of the model itself: temperature, filters, penalties and biases change the tokens but not what is reported."""
    make_engine_checkpoint(tmp_path, family, 1, dtype)
    engine = make_engine(
        tmp_path,
        dtype,
        block_size=4,
        max_num_batched_tokens=7,
        watermark=0.0,
        num_gpu_blocks=14 if pressure == "tight" else 200,
    )
    prompts = random_prompts(1, [1, 30, 12, 9, 14, 10, 3, 11])
    options: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 0},
        {"temperature": 0, "logprobs": 5},
        {"temperature": 1.5, "logprobs": 1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "logprobs": 3},
        {"temperature": 0, "repetition_penalty": 1.7, "presence_penalty": 1.0, "logprobs": 2},
        {"temperature": 2.0, "logit_bias": {7: 6.0}, "min_tokens": 10, "logprobs": 4},
        {"temperature": 1.0, "n": 3, "logprobs": 2},
        {"temperature": 1.0},
    ]
    params = [SamplingParams(seed=9, max_tokens=20, **each) for each in options]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    assert (engine.stats().num_preemptions > 0) == (pressure == "tight")
    model = reference_model(tmp_path, dtype)
    for output, each in zip(outputs, params, strict=True):
        assert_token_logprobs(engine, model, output, each, TOLERANCE[dtype])


def test_token_logprobs_of_the_whole_vocabulary(tmp_path: Path) -> None:
    make_engine_checkpoint(tmp_path, "qwen2", 2, torch.float64)
    engine = make_engine(tmp_path)
    params = SamplingParams(temperature=1.2, max_tokens=6, logprobs=VOCAB_SIZE)
    (output,) = engine.generate(random_prompts(2, [8]), params, use_tqdm=False)
    assert_token_logprobs(engine, reference_model(tmp_path, torch.float64), output, params, 1e-8)
    assert output.logprobs is not None
    for place in output.logprobs:
        assert sorted(entry.rank for entry in place.values()) == list(range(1, VOCAB_SIZE + 1))


def test_increments_carry_the_same_logprobs_as_the_whole(tmp_path: Path) -> None:
    make_engine_checkpoint(tmp_path, "qwen3", 3)
    engine = make_engine(tmp_path, torch.float32)
    increments: list[Any] = []
    params = SamplingParams(temperature=1, n=2, max_tokens=9, logprobs=2)
    engine.submit(engine.make_request([3, 1, 4], params, listener=increments.append))
    while not engine.is_finished():
        engine.step()
    (output,) = [increment.output for increment in increments if increment.output is not None]
    for index, completion in enumerate(output.outputs):
        own = [increment for increment in increments if increment.index == index]
        assert [place for increment in own for place in increment.logprobs] == completion.logprobs


# ---- prompts -------------------------------------------------------------------------------------------------------

BUDGETS = [1, 5, 64, 100, 2048]
LENGTHS = [1, 2, 9, 40, 64, 65, 66, 150]  # also around the 64 rows of the vocabulary that are computed at once


@pytest.mark.parametrize("num_top", [0, 3])
@pytest.mark.parametrize("budget", BUDGETS)
def test_prompt_logprobs_in_chunks_of_any_size(tmp_path: Path, budget: int, num_top: int) -> None:
    """max_tokens is 0 for every other request. The families take turns."""
    family = VARIED_FAMILIES[(BUDGETS.index(budget) + num_top) % len(VARIED_FAMILIES)]
    make_engine_checkpoint(tmp_path, family, 4, torch.float64)
    engine = make_engine(tmp_path, max_num_batched_tokens=budget, block_size=8)
    prompts = random_prompts(4, LENGTHS)
    params = [
        SamplingParams(temperature=0, prompt_logprobs=num_top, max_tokens=3 * (place % 2))
        for place in range(len(prompts))
    ]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    model = reference_model(tmp_path, torch.float64)
    for output, each in zip(outputs, params, strict=True):
        assert_prompt_logprobs(engine, model, output, num_top)
        if each.max_tokens == 0:
            assert (output.token_ids, output.text, output.cumulative_logprob) == ([], "", 0.0)
            assert output.finish_reason == "length"
        else:
            assert_token_logprobs(engine, model, output, each, 1e-8)
    assert engine.stats().num_used_blocks == 0


@pytest.mark.parametrize("family", VARIED_FAMILIES)
def test_prompt_logprobs_in_float32(tmp_path: Path, family: str) -> None:
    make_engine_checkpoint(tmp_path, family, 5)
    engine = make_engine(tmp_path, torch.float32, max_num_batched_tokens=30)
    params = SamplingParams(prompt_logprobs=4, max_tokens=0)
    outputs = engine.generate(random_prompts(5, LENGTHS), params, use_tqdm=False)
    model, exact = (reference_model(tmp_path, dtype) for dtype in (torch.float32, torch.float64))
    # A model may amplify rounding errors, the reference's too, so that two right results are further apart.
    own = max((logprobs_of(model, output) - logprobs_of(exact, output)).abs().max().item() for output in outputs)
    for output in outputs:
        assert_prompt_logprobs(engine, model, output, 4, max(TOLERANCE[torch.float32], 4 * own))


def logprobs_of(model: PreTrainedModel, output: GenerateOutput) -> torch.Tensor:
    """A reference's log probabilities after each token of a prompt, float64 ``[T, vocab]``."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([output.prompt_token_ids])).logits[0]
    return logits.double().log_softmax(-1)


def test_prompt_logprobs_of_the_whole_vocabulary(tmp_path: Path) -> None:
    make_engine_checkpoint(tmp_path, "llama", 6, torch.float64)
    engine = make_engine(tmp_path)
    params = SamplingParams(prompt_logprobs=VOCAB_SIZE, max_tokens=0)
    (output,) = engine.generate(random_prompts(6, [5]), params, use_tqdm=False)
    assert_prompt_logprobs(engine, reference_model(tmp_path, torch.float64), output, VOCAB_SIZE)


@pytest.mark.parametrize("budget", [2, 3, 6, 50])
def test_prompt_logprobs_survive_preemption(tmp_path: Path, budget: int) -> None:
    """The first request grows until it takes the blocks of the second: within its prompt or, with a large budget,
    after it. What was known of the prompt then is reported once all the same."""
    make_engine_checkpoint(tmp_path, "mistral", 7, torch.float64, sliding_window=8)
    engine = make_engine(tmp_path, block_size=4, num_gpu_blocks=14, max_num_batched_tokens=budget, watermark=0.0)
    prompts = random_prompts(7, [4, 40])
    params = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=2, logprobs=1),
    ]
    for prompt, each in zip(prompts, params, strict=True):
        engine.add_request(prompt, each, request_id=str(len(prompt)))
    computed_when_preempted = []
    before = 0
    scheduler = engine._loop.scheduler
    while not engine.is_finished():
        (second,) = [s for s in (*scheduler.running, *scheduler.waiting) if s.request_id == "40"] or [None]
        engine.step()
        if second is not None and second.num_preemptions > len(computed_when_preempted):
            computed_when_preempted.append(before)
        before = 0 if second is None else second.num_computed_tokens
    assert computed_when_preempted and any(0 < computed < 40 for computed in computed_when_preempted) == (budget < 6), (
        computed_when_preempted
    )
    output = engine.get_output("40")
    assert output is not None and output.metrics.num_preemptions == len(computed_when_preempted)
    model = reference_model(tmp_path, torch.float64)
    assert_prompt_logprobs(engine, model, output, 2)
    assert_token_logprobs(engine, model, output, params[1], 1e-8)


@pytest.mark.parametrize("max_tokens", [0, 8])
@pytest.mark.parametrize("num_gpu_blocks", [11, 200])
def test_prompt_logprobs_with_several_completions(tmp_path: Path, max_tokens: int, num_gpu_blocks: int) -> None:
    """Reported once, whichever completion is computed when; 11 blocks hold one completion at a time."""
    make_engine_checkpoint(tmp_path, "qwen3", 8, torch.float64)
    engine = make_engine(tmp_path, max_num_batched_tokens=9, block_size=4, num_gpu_blocks=num_gpu_blocks)
    params = SamplingParams(n=2, seed=1, max_tokens=max_tokens, prompt_logprobs=2, logprobs=2)
    outputs = engine.generate(random_prompts(8, [25, 1, 33]), params, use_tqdm=False)
    model = reference_model(tmp_path, torch.float64)
    for output in outputs:
        assert len(output.outputs) == 2
        assert_prompt_logprobs(engine, model, output, 2)
        if max_tokens:
            assert_token_logprobs(engine, model, output, params, 1e-8)
        else:
            assert [completion.logprobs for completion in output.outputs] == [[], []]


def test_requests_that_do_not_ask_get_none(tmp_path: Path) -> None:
    """Beside one that does, in the same batch."""
    make_engine_checkpoint(tmp_path, "llama", 9)
    engine = make_engine(tmp_path, torch.float32)
    params = [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=1)]
    silent, speaking = engine.generate(random_prompts(9, [6, 7]), params, use_tqdm=False)
    assert silent.logprobs is None and silent.prompt_logprobs is None
    assert speaking.logprobs is not None and speaking.prompt_logprobs is not None


@pytest.mark.parametrize("token_id", [3, 5, 9])
def test_a_place_reads_as_a_dict(token_id: int) -> None:
    score = TokenScore(-2.5, 7, (5, 3, 8), (-0.5, -1.5, -2.25))
    place = PlaceLogprobs(token_id, score, str)
    expected = {token_id: Logprob(-2.5, 7, str(token_id))}
    for rank, (likely_id, logprob) in enumerate(zip(score.top_ids, score.top_logprobs, strict=True), 1):
        expected.setdefault(likely_id, Logprob(logprob, rank, str(likely_id)))
    assert place == expected and list(place.items()) == list(expected.items()) and len(place) == len(expected)
    assert repr(place) == repr(expected) and 4 not in place and place.get(4) is None
    for copied in (copy.deepcopy(place), pickle.loads(pickle.dumps(place))):
        assert copied == expected and type(copied) is dict


def test_places_are_no_work_for_the_collector(tmp_path: Path) -> None:
    """An answer may have thousands of places: what is kept of each are two objects, whatever number of likely tokens
    was asked for. One for each token makes every full collection of garbage stop the process for a second."""
    engine = make_engine(make_engine_checkpoint(tmp_path))
    params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=20, n=2)
    engine.generate("One", params, use_tqdm=False)
    gc.collect()
    before = len(gc.get_objects())
    (output,) = engine.generate("One", params, use_tqdm=False)
    gc.collect()
    assert sum(len(completion.logprobs or ()) for completion in output.outputs) == 120
    assert len(gc.get_objects()) - before < 2 * 120 + 100
