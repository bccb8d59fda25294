"""The same seed gives the same tokens alone, in any batch, under any budget, and after any preemption (float64)."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import GenerateOutput, LLMEngine, SamplingParams
from tests.models.checkpoints import VARIED_FAMILIES

from .checkpoints import VOCAB_SIZE, make_engine_checkpoint

NUM_REQUESTS = 50
MAX_TOKENS = 14


OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in VARIED_FAMILIES if family != "mistral"]


@pytest.fixture(scope="module", params=["mistral", *OTHERS])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / request.param
    return make_engine_checkpoint(path, request.param, 11, torch.float64)


def make_engine(path: Path, **fields: Any) -> LLMEngine:
    return LLMEngine(model=path, device="cpu", dtype="float64", **{"num_gpu_blocks": 500, **fields})


def draw_requests(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests that sample in every way there is, each with a seed of its own."""
    draw = random.Random(seed)
    prompts, params = [], []
    for _ in range(NUM_REQUESTS):
        prompts.append([draw.randrange(VOCAB_SIZE) for _ in range(draw.choice((1, 3, 8, 20)))])
        options = {
            "temperature": draw.uniform(0.5, 2),
            "top_k": draw.randint(5, 200),
            "top_p": draw.uniform(0.5, 1),
            "min_p": draw.uniform(0, 0.1),
            "repetition_penalty": draw.uniform(0.8, 1.5),
            "presence_penalty": draw.uniform(-1, 1),
            "frequency_penalty": draw.uniform(-0.5, 1),
            "logit_bias": {draw.randrange(VOCAB_SIZE): 2.0},
            "min_tokens": 4,
            "n": 2,
        }
        chosen = {name: value for name, value in options.items() if draw.random() < 0.4}
        params.append(
            SamplingParams(**chosen, seed=draw.randrange(-(2**63), 2**64), max_tokens=draw.randint(5, MAX_TOKENS))
        )
    return prompts, params


def tokens_of(outputs: list[GenerateOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[list[int]]]:
    """What each request gives when nobody else is there."""
    engine = make_engine(checkpoint)
    prompts, params = draw_requests(0)
    return [
        tokens_of(engine.generate([prompt], each, use_tqdm=False))[0]
        for prompt, each in zip(prompts, params, strict=True)
    ]


SURROUNDINGS: dict[str, dict[str, Any]] = {
    "batch of 50": {},
    "few seats": {"max_num_seqs": 7, "block_size": 3},
    "token by token": {"max_num_batched_tokens": 1},
    "tiny budget": {"max_num_batched_tokens": 5, "block_size": 5},
    "preemption": {"block_size": 2, "num_gpu_blocks": 24, "watermark": 0.0},
    "preemption and tiny budget": {
        "block_size": 3,
        "num_gpu_blocks": 14,
        "max_num_batched_tokens": 8,
        "watermark": 0.0,
    },
    "large blocks": {"block_size": 512, "num_gpu_blocks": 3},
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_seed_gives_the_same_tokens_in_any_surroundings(
    checkpoint: Path, alone: list[list[list[int]]], surroundings: str
) -> None:
    engine = make_engine(checkpoint, **SURROUNDINGS[surroundings])
    prompts, params = draw_requests(0)
    assert tokens_of(engine.generate(prompts, params, use_tqdm=False)) == alone
    if "preemption" in surroundings:
        assert engine.stats().num_preemptions > 0


def test_a_seed_gives_the_same_tokens_in_any_order(checkpoint: Path, alone: list[list[list[int]]]) -> None:
    """Also beside other requests that come and go."""
    engine = make_engine(checkpoint, block_size=4)
    prompts, params = draw_requests(0)
    draw = random.Random(1)
    order = draw.sample(range(NUM_REQUESTS), NUM_REQUESTS)
    ids = {}
    for place in order:
        ids[place] = engine.add_request(prompts[place], params[place])
        disturbing = engine.add_request([draw.randrange(VOCAB_SIZE)] * draw.randint(1, 9), max_tokens=50)
        for _ in range(draw.randint(0, 2)):
            engine.step()
        engine.abort(disturbing)
    while not engine.is_finished():
        engine.step()
    outputs = [engine.get_output(ids[place]) for place in range(NUM_REQUESTS)]
    assert tokens_of([output for output in outputs if output is not None]) == alone


def test_every_way_to_ask_gives_the_same(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    params = SamplingParams(seed=5, max_tokens=20)
    (whole,) = engine.generate("Same seed", params, use_tqdm=False)
    request_id = engine.add_request("Same seed", params)
    output = None
    while output is None:
        output = engine.get_output(request_id)
    assert output.token_ids == whole.token_ids
    assert "".join(engine.stream("Same seed", params)) == whole.text


def test_completions_differ_from_each_other_and_come_again(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    params = SamplingParams(n=3, seed=6, max_tokens=20, ignore_eos=True)
    prompt = [7, 7, 7]
    (once,), (again,) = (tokens_of(engine.generate([prompt], params, use_tqdm=False)) for _ in range(2))
    assert once == again
    assert len({tuple(tokens) for tokens in once}) == 3
    # How many are asked for does not matter to each.
    for n in (1, 2, 5):
        (other,) = engine.generate([prompt], SamplingParams(n=n, seed=6, max_tokens=20, ignore_eos=True), False)
        assert tokens_of([other])[0][:3] == once[:n]


def test_other_seeds_give_other_tokens(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    params = [SamplingParams(seed=seed, max_tokens=20, ignore_eos=True) for seed in (0, 1, 2, 2**32, 2**63, -1)]
    outputs = engine.generate([[9, 9]] * len(params), params, use_tqdm=False)
    assert len({tuple(output.token_ids) for output in outputs}) == len(params)


def test_seeds_count_modulo_two_to_the_64(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    params = [SamplingParams(seed=seed, max_tokens=20) for seed in (-3, 2**64 - 3)]
    negative, positive = engine.generate([[9, 9]] * 2, params, use_tqdm=False)
    assert negative.token_ids == positive.token_ids


def unseeded(path: Path, seed: int, **fields: Any) -> list[list[list[int]]]:
    """Equal requests without seeds, on a fresh engine."""
    engine = make_engine(path, seed=seed, **fields)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    return tokens_of(engine.generate([[5, 6]] * 8, params, use_tqdm=False))


def test_requests_without_a_seed_follow_from_the_engines(checkpoint: Path) -> None:
    tokens = unseeded(checkpoint, 3)
    assert unseeded(checkpoint, 3) == tokens
    assert unseeded(checkpoint, 3, max_num_batched_tokens=3, block_size=3, num_gpu_blocks=12, watermark=0.0) == tokens
    assert len({tuple(each[0]) for each in tokens}) == len(tokens), "equal requests without seeds must differ"


@pytest.mark.parametrize("seed", [1, 2**32, 2**63 - 1])
def test_engines_with_other_seeds_give_other_tokens(checkpoint: Path, seed: int) -> None:
    assert unseeded(checkpoint, seed) != unseeded(checkpoint, 0)
