"""The sampler against exact distributions that are computed here one token at a time, and against transformers'."""

import math
import random
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mini_infer import SamplingParams, kernels
from mini_infer.engine.describe import Wanted
from mini_infer.engine.rules import Rule, make_rules
from mini_infer.executor import sampler
from mini_infer.scheduler import Sequence
from mini_infer.step import Draws, LogitEdits

VOCAB_SIZE = 24
PROMPT = [3, 9, 3, 17]
GENERATED = [5, 9, 5, 5, 20]
STOP_TOKEN_IDS = (0, 5, 12)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 5},
    "top_k one": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 0.01},
    "min_p": {"min_p": 0.2},
    "min_p one": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.8},
    "repetition rewarded": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "presence rewarded": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.7},
    "frequency rewarded": {"frequency_penalty": -0.9},
    "bias": {"logit_bias": {2: 3.0, 5: -2.5, 23: 0.75}},
    "bias away": {"logit_bias": dict.fromkeys(range(20), -100)},
    "not yet to stop": {"min_tokens": 6},
    "top_k and top_p": {"top_k": 9, "top_p": 0.8},
    "top_p and min_p": {"top_p": 0.9, "min_p": 0.1, "temperature": 1.7},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "temperature": 0.8},
    "all": {
        "temperature": 1.3,
        "top_k": 15,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {1: 1.33, 9: 0.57, 4: -0.41},
        "min_tokens": 6,
    },
}


KERNELS = kernels.resolve("cpu")


@dataclass
class Row:
    """A row of the batch: what a completion has generated so far, and how it is to go on."""

    params: SamplingParams
    seed: int
    index: int
    length: int
    rules: tuple[Rule, ...]


def sample(logits: Tensor, rows: Seq[Row]) -> tuple[Tensor, Tensor]:
    return sampler.sample(logits, draws_of(rows), KERNELS)


def draws_of(rows: Seq[Row]) -> Draws:
    wanted = Wanted()
    for place, row in enumerate(rows):
        sequence = Sequence("row", [], 0, 1)
        wanted.draw(place, sequence, (row.seed, row.index, row.length), row.params, row.rules, [])
    return wanted.draws(range(len(rows)))


def completion(
    params: SamplingParams,
    *,
    seed: int = 0,
    index: int = 0,
    prompt: Seq[int] = PROMPT,
    generated: Seq[int] = GENERATED,
    stop_token_ids: Seq[int] = STOP_TOKEN_IDS,
) -> Row:
    (rules,) = make_rules(params, list(prompt), frozenset(stop_token_ids))
    for token_id in generated:
        for rule in rules:
            rule.accept(token_id)
    return Row(params, seed, index, len(prompt) + len(generated), rules)


def completions(params: SamplingParams, count: int, seed: int) -> list[Row]:
    """Rows that share one distribution and have different seeds, indices and positions.

    A longer prompt of the same tokens moves the position and nothing else.
    """
    draw = random.Random(seed)
    return [
        completion(
            params, seed=draw.randrange(-(2**63), 2**64), index=draw.randrange(4), prompt=PROMPT + [3] * (row % 11)
        )
        for row in range(count)
    ]


def draw_tokens(logits: Tensor, params: SamplingParams, count: int, seed: int) -> list[int]:
    """Many tokens drawn from one row of logits."""
    return sample(logits.expand(count, -1), completions(params, count, seed))[0].tolist()


def exact_distribution(
    logits: Seq[float],
    params: SamplingParams,
    prompt: Seq[int] = PROMPT,
    generated: Seq[int] = GENERATED,
    stop_token_ids: Seq[int] = STOP_TOKEN_IDS,
) -> list[float]:
    """The probability of each token by the definitions of SamplingParams, token by token in Python's floats."""
    scores = list(logits)
    for token_id in {*prompt, *generated}:
        factor = params.repetition_penalty
        scores[token_id] = scores[token_id] / factor if scores[token_id] > 0 else scores[token_id] * factor
    for token_id, count in Counter(generated).items():
        scores[token_id] -= params.presence_penalty + params.frequency_penalty * count
    for token_id, bias in (params.logit_bias or {}).items():
        scores[token_id] += bias
    if len(generated) < params.min_tokens:
        for token_id in stop_token_ids:
            scores[token_id] = -math.inf

    best = max(scores)
    weights = {token_id: math.exp((score - best) / params.temperature) for token_id, score in enumerate(scores)}
    if params.top_k > 0:
        last = sorted(weights.values(), reverse=True)[: params.top_k][-1]
        weights = {token_id: weight for token_id, weight in weights.items() if weight >= last}
    if params.top_p < 1:
        total, reached = sum(weights.values()), 0.0
        for token_id in sorted(weights, key=weights.__getitem__, reverse=True):
            if reached >= params.top_p * total:
                del weights[token_id]
            else:
                reached += weights[token_id]
    weights = {token_id: weight for token_id, weight in weights.items() if weight >= params.min_p}
    total = sum(weights.values())
    return [weights.get(token_id, 0.0) / total for token_id in range(len(logits))]


def assert_drawn_from(tokens: Seq[int], probabilities: Seq[float], seed: int) -> None:
    """Nothing outside the support, everything likely inside it, and the right frequencies by a chi-square test."""
    stats = pytest.importorskip("scipy.stats", reason="the distribution tests need scipy")
    print(f"seed {seed}")
    expected = np.array(probabilities) * len(tokens)
    observed = np.bincount(tokens, minlength=len(probabilities))
    assert not observed[expected == 0].any(), "a token was drawn that the filters drop"
    assert observed[expected > 30].all(), "a token was never drawn, which chance allows once in 10^13 times"
    rare = expected < 5  # too rare for the chi-square approximation one by one, so they count together
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    counted = expected > 0
    if counted.sum() > 1:
        assert stats.chisquare(observed[counted], expected[counted]).pvalue > 1e-4


def distinct_logits(seed: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    """Logits in random order with no two alike, all exact in every dtype."""
    steps = torch.arange(vocab_size, dtype=torch.float64) - vocab_size // 2
    return (steps * 0.25)[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))]


def random_logits(seed: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return 1.5 * torch.randn(vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- distributions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_follow_the_exact_distribution(case: str, seed: int) -> None:
    params = SamplingParams(**CASES[case])
    logits = random_logits(seed)
    tokens = draw_tokens(logits.float(), params, 4000, seed)
    assert_drawn_from(tokens, exact_distribution(logits.float().tolist(), params), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "top_k and top_p", "all"])
def test_every_dtype_gives_the_same_distribution(case: str, dtype: torch.dtype) -> None:
    params = SamplingParams(**CASES[case])
    logits = distinct_logits(3)
    tokens = draw_tokens(logits.to(dtype), params, 4000, seed=3)
    assert_drawn_from(tokens, exact_distribution(logits.tolist(), params), seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_row_of_a_mixed_batch_follows_its_own_distribution(dtype: torch.dtype) -> None:
    """Every case at once, and greedy rows between them, each with logits of its own."""
    seed, count = 4, 1500
    all_params = [SamplingParams(**fields) for fields in CASES.values()] + [SamplingParams(temperature=0)]
    all_logits = [random_logits(seed + place).to(dtype) for place in range(len(all_params))]
    columns = [completions(params, count, seed + place) for place, params in enumerate(all_params)]
    rows = [row for together in zip(*columns, strict=True) for row in together]
    tokens, _ = sample(torch.stack(all_logits).repeat(count, 1), rows)
    for place, (params, logits) in enumerate(zip(all_params, all_logits, strict=True)):
        drawn = tokens[place :: len(all_params)].tolist()
        if params.greedy:
            assert set(drawn) == {logits.argmax().item()}
        else:
            assert_drawn_from(drawn, exact_distribution(logits.tolist(), params), seed + place)


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    rows = [
        completion(SamplingParams(**fields), seed=seed, index=seed % 3)
        for seed, fields in enumerate([*CASES.values(), {"temperature": 0}] * 3)
    ]
    logits = torch.stack([random_logits(seed) for seed in range(len(rows))])
    tokens, logprobs = sample(logits, rows)
    order = random.Random(5).sample(range(len(rows)), len(rows))
    shuffled, _ = sample(logits[order], [rows[row] for row in order])
    assert shuffled.tolist() == tokens[order].tolist()
    for row, alone in enumerate(rows):
        token, logprob = sample(logits[row : row + 1], [alone])
        assert (token.item(), logprob.item()) == (tokens[row].item(), pytest.approx(logprobs[row].item(), abs=1e-12))


@pytest.mark.parametrize("axis", ["seed", "index", "position"])
def test_tokens_follow_the_distribution_along_each_coordinate(axis: str) -> None:
    """Over the positions of one text, over the completions of one request, and over seeds that count up."""
    logits, params = random_logits(20), SamplingParams(temperature=1.2)
    rows = [
        completion(
            params,
            seed=place if axis == "seed" else 1,
            index=place if axis == "index" else 0,
            prompt=[0] * (place + 1 if axis == "position" else 1),
            generated=[],
        )
        for place in range(2000)
    ]
    tokens = sample(logits.expand(len(rows), -1), rows)[0].tolist()
    assert_drawn_from(tokens, exact_distribution(logits.tolist(), params), seed=20)


def random_filters(seed: int) -> dict[str, Any]:
    """Parameters that transformers knows too, each used or not by chance."""
    draw = random.Random(seed)
    choices = {
        "temperature": draw.uniform(0.3, 3),
        "top_k": draw.randint(1, VOCAB_SIZE + 3),
        "top_p": draw.uniform(0.05, 0.999),
        "min_p": draw.uniform(0.001, 0.5),
        "repetition_penalty": draw.uniform(0.5, 2),
    }
    return {name: value for name, value in choices.items() if draw.random() < 0.6}


@pytest.mark.parametrize("seed", range(40))
def test_the_filters_are_those_of_transformers_in_their_order(seed: int) -> None:
    params = SamplingParams(**random_filters(seed))
    logits = random_logits(seed)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    processors.append(TopPLogitsWarper(params.top_p))
    processors.append(MinPLogitsWarper(params.min_p))
    context = torch.tensor([PROMPT + GENERATED])
    theirs = processors(context, logits[None].clone())[0].softmax(dim=-1).tolist()
    assert exact_distribution(logits.tolist(), params) == pytest.approx(theirs, abs=1e-12)
    assert_drawn_from(draw_tokens(logits, params, 2000, seed), theirs, seed)


# ---- greedy, log probabilities, stopping ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in CASES if name != "bias away"])
def test_greedy_takes_the_most_likely_token_after_penalties(case: str, dtype: torch.dtype) -> None:
    fields = {name: value for name, value in CASES[case].items() if name != "temperature"}
    for seed in range(8):
        logits = distinct_logits(seed)
        exact = exact_distribution(logits.tolist(), SamplingParams(**fields))
        if sorted(exact)[-2] > 0.999 * max(exact):
            continue  # a penalty has made two tokens alike, and either may come
        token, _ = sample(logits.to(dtype)[None], [completion(SamplingParams(**fields, temperature=0))])
        assert token.item() == exact.index(max(exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_are_the_models_own_before_any_filter(dtype: torch.dtype) -> None:
    rows = [completion(SamplingParams(**fields), seed=6) for fields in [*CASES.values(), {"temperature": 0}]]
    logits = torch.stack([distinct_logits(seed) for seed in range(len(rows))]).to(dtype)
    before = logits.clone()
    tokens, logprobs = sample(logits, rows)
    expected = before.double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-12 if dtype is torch.float64 else 1e-5)
    assert tokens.dtype is torch.int64
    assert torch.equal(logits, before), "the logits still serve for reporting, so they must stay as they were"


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("num_generated", range(5))
def test_min_tokens_bans_stop_tokens_until_there_are_that_many(num_generated: int, temperature: float) -> None:
    logits = torch.full((VOCAB_SIZE,), -2.0)
    logits[list(STOP_TOKEN_IDS)] = 5.0
    params = SamplingParams(min_tokens=3, temperature=temperature)
    rows = [completion(params, seed=seed, generated=[7] * num_generated) for seed in range(500)]
    drawn = set(sample(logits.expand(500, -1), rows)[0].tolist())
    if num_generated < 3:
        assert not drawn & set(STOP_TOKEN_IDS)
    else:
        assert drawn & set(STOP_TOKEN_IDS)


def test_a_bias_does_not_lift_the_ban_on_stopping_early() -> None:
    params = SamplingParams(min_tokens=6, logit_bias=dict.fromkeys(STOP_TOKEN_IDS, 100))
    assert not set(draw_tokens(random_logits(7).float(), params, 500, seed=7)) & set(STOP_TOKEN_IDS)


# ---- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-46, 1e-300, 5e-324])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float, dtype: torch.dtype) -> None:
    logits = distinct_logits(8)
    params = SamplingParams(temperature=temperature)
    assert set(draw_tokens(logits.to(dtype), params, 50, seed=8)) == {logits.argmax().item()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e10, 1e38, 1e39, 1e300])
def test_a_huge_temperature_makes_all_tokens_alike_but_the_impossible_ones(
    temperature: float, dtype: torch.dtype
) -> None:
    logits = distinct_logits(9)
    logits[::3] = -torch.inf
    tokens = draw_tokens(logits.to(dtype), SamplingParams(temperature=temperature), 3000, seed=9)
    possible = [float(logit > -math.inf) for logit in logits.tolist()]
    assert_drawn_from(tokens, [each / sum(possible) for each in possible], seed=9)


@pytest.mark.parametrize("case", CASES)
def test_impossible_tokens_stay_impossible(case: str) -> None:
    logits = random_logits(10)
    banned = [0, 1, 4, 9, 17, 20, 22]  # some of them seen, generated, rewarded or at the edge of the vocabulary
    logits[banned] = -torch.inf
    params = SamplingParams(**CASES[case])
    tokens = draw_tokens(logits.float(), params, 1000, seed=10)
    assert not set(tokens) & set(banned)
    assert_drawn_from(tokens, exact_distribution(logits.float().tolist(), params), seed=10)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_extreme_numbers_give_possible_tokens(
    monkeypatch: pytest.MonkeyPatch, uniform: float, dtype: torch.dtype
) -> None:
    """The first and the last tokens are dropped, so a draw that is off by one rounding error would show."""
    monkeypatch.setattr("mini_infer.executor.sampler.uniforms", lambda seeds, *_: np.full(len(seeds), uniform))
    for seed in range(50):
        logits = random_logits(seed, vocab_size=1000).to(dtype)
        logits[:100] = logits[-100:] = -torch.inf
        token, _ = sample(logits[None], [completion(SamplingParams(top_k=50 if seed % 2 else -1))])
        assert 100 <= token.item() < 900
        assert token.item() in logits.topk(50).indices.tolist() or seed % 2 == 0


def test_tokens_as_likely_as_the_kth_all_stay() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0, -1.0])
    for top_k, kept in ((1, [1, 3]), (2, [1, 3]), (3, [1, 2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5])):
        rows = [completion(SamplingParams(top_k=top_k), seed=seed, prompt=[0], generated=[]) for seed in range(2000)]
        tokens = sample(logits.expand(2000, -1), rows)[0].tolist()
        weights = [math.exp(logit) if token_id in kept else 0.0 for token_id, logit in enumerate(logits.tolist())]
        assert_drawn_from(tokens, [weight / sum(weights) for weight in weights], seed=0)


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.05, 1), (0.35, 4), (0.55, 6), (0.95, 10)])
def test_top_p_among_equals_keeps_as_few_as_reach_it(top_p: float, num_kept: int) -> None:
    rows = [completion(SamplingParams(top_p=top_p), seed=seed, prompt=[0], generated=[]) for seed in range(1000)]
    assert len(set(sample(torch.zeros(1000, 10), rows)[0].tolist())) == num_kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_p", [1e-9, 1e-50, 5e-324])
def test_a_tiny_top_p_keeps_the_most_likely_token(top_p: float, dtype: torch.dtype) -> None:
    logits = distinct_logits(11)
    assert set(draw_tokens(logits.to(dtype), SamplingParams(top_p=top_p), 50, seed=11)) == {logits.argmax().item()}


@pytest.mark.parametrize("case", [name for name, fields in CASES.items() if "logit_bias" not in fields])
def test_a_vocabulary_of_one_token(case: str) -> None:
    params = SamplingParams(**{**CASES[case], "min_tokens": 0})
    tokens, logprobs = sample(torch.tensor([[-3.0]]), [completion(params, prompt=[0, 0], generated=[0])])
    assert (tokens.tolist(), logprobs.tolist()) == ([0], [0.0])


@pytest.mark.parametrize("top_k", [-1, 0, VOCAB_SIZE, VOCAB_SIZE + 1, 10**30])
def test_top_k_beyond_the_vocabulary_keeps_everything(top_k: int) -> None:
    logits = random_logits(12)
    everything = draw_tokens(logits, SamplingParams(), 300, seed=12)
    assert draw_tokens(logits, SamplingParams(top_k=top_k), 300, seed=12) == everything


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_logits_of_any_magnitude(scale: float) -> None:
    logits = scale * distinct_logits(13)
    tokens = draw_tokens(logits.float(), SamplingParams(), 2000, seed=13)
    assert_drawn_from(tokens, exact_distribution(logits.tolist(), SamplingParams()), seed=13)


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({}, math.nan),
        ({"temperature": 0}, math.nan),
        ({}, math.inf),
        ({}, -math.inf),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, math.nan),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, -math.inf),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0}, math.inf),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_that_is_not_finite_disturbs_no_other(fields: dict[str, Any], bad: float, dtype: torch.dtype) -> None:
    """Its own token must be in the vocabulary, and its log probability NaN: by that the engine notices."""
    good = completion(SamplingParams(top_p=0.9, top_k=12), seed=14)
    logits = torch.stack([random_logits(14), torch.full((VOCAB_SIZE,), bad), random_logits(15)]).to(dtype)
    tokens, logprobs = sample(logits, [good, completion(SamplingParams(**fields)), good])
    assert 0 <= tokens[1] < VOCAB_SIZE
    assert logprobs[1].isnan()
    assert tokens[::2].tolist() == sample(logits[::2], [good, good])[0].tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-50},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e39},
        {"repetition_penalty": 1e308},
        {"min_tokens": 8, "stop_token_ids": list(range(VOCAB_SIZE))},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0, 5e-324, 1, 1e300])
def test_extreme_parameters_disturb_no_other_row(fields: dict[str, Any], temperature: float) -> None:
    """Parameters that SamplingParams accepts and that leave float32's range, or ban every token there is."""
    params = SamplingParams(temperature=temperature, **fields)
    good = completion(SamplingParams(top_p=0.9, top_k=12), seed=16)
    logits = torch.stack([random_logits(seed) for seed in (16, 17, 18)]).float()
    extreme = completion(params, stop_token_ids=params.stop_token_ids or STOP_TOKEN_IDS)
    tokens, _ = sample(logits, [good, extreme, good])
    assert 0 <= tokens[1] < VOCAB_SIZE
    assert tokens[::2].tolist() == sample(logits[::2], [good, good])[0].tolist()


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 2**64 - 1])
def test_any_seed_that_the_parameters_allow_draws_a_token(seed: int) -> None:
    assert SamplingParams(seed=seed).seed == seed
    rows = [completion(SamplingParams(), seed=each) for each in (seed, seed % 2**64)]
    tokens, _ = sample(random_logits(19).expand(2, -1), rows)
    assert tokens[0] == tokens[1]


class TestMasks:
    """Bits that say which tokens a draw may give, beside everything else that changes logits."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_only_allowed_tokens_come(self, dtype: torch.dtype, temperature: float) -> None:
        generator = torch.Generator().manual_seed(1)
        num_rows, vocab = 24, 131  # no multiple of 8
        logits = torch.randn(num_rows, vocab, generator=generator).to(dtype)
        allowed = torch.rand(num_rows, vocab, generator=generator) < 0.2
        allowed[:, 0] = True
        masked = [row for row in range(num_rows) if row % 3]
        params = SamplingParams(temperature=temperature, seed=5)
        draws = draws_of(completions(params, num_rows, 5))
        packed = np.packbits(allowed.numpy()[masked], axis=-1, bitorder="little")
        for extra in ({}, {"added_draws": np.array([1]), "added_ids": np.array([7]), "terms": np.array([0.5])}):
            edits = LogitEdits(
                **extra,
                masked_draws=np.array(masked),
                masks=packed,
                forced_draws=np.array([2, 3]),
                forced_ids=np.array([9, 130]),
            )
            token_ids, logprobs = sampler.sample(logits, replace(draws, edits=edits), KERNELS)
            wide = logits.double().clone()
            if extra:
                wide[1, 7] += 0.5
            for row in masked:
                wide[row, ~allowed[row]] = -torch.inf
            if temperature:
                plain = replace(draws, edits=LogitEdits())
                expected, _ = sampler.sample(wide.to(dtype), plain, KERNELS)
            else:
                expected = wide.argmax(dim=-1)
            expected[2], expected[3] = 9, 130
            assert token_ids.tolist() == expected.tolist()
            true = logits.double().log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]
            assert torch.allclose(logprobs.double(), true, atol=1e-5)
