"""Greedy tokens equal transformers' `generate`, whatever the batch, the blocks, the budget and the preemptions.

In float64 the reference is made to compute in float64 throughout (see `reference_model`). Its `generate` still compares
logits in float32, so where its two best lie within 1e-6 either token may come. In float32 that distance is 1e-4. Both
are counted, and the counts are printed when the module ends.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mini_infer import GenerateOutput, LLMEngine, SamplingParams
from tests.models.checkpoints import FAMILIES, ROPE_SCALINGS
from tests.models.test_decoder import reference_model

from .checkpoints import EOS, VOCAB_SIZE, make_engine_checkpoint

NEAR_TIE = {torch.float64: 1e-6, torch.float32: 1e-4}
LOGPROB_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # what `generate` shows is rounded to float32
NUM_TOP = 3


@dataclass(frozen=True)
class Reference:
    """What transformers generates for one prompt.

    Attributes:
        token_ids: the new tokens.
        scores: ``[T, vocab]``, what its greedy choice compared: logits after penalties and bans.
        logits: ``[T, vocab]``, the model's own.
        stop_token_ids: what would have ended it.
    """

    token_ids: list[int]
    scores: Tensor
    logits: Tensor
    stop_token_ids: frozenset[int]

    @property
    def finish_reason(self) -> str:
        return "stop" if self.token_ids[-1] in self.stop_token_ids else "length"


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Counts over the whole module, printed when it ends, also when pytest captures output."""
    counts: Counter[str] = Counter()
    yield counts
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\nequal to transformers: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))


@contextmanager
def eos_token_ids(model: PreTrainedModel, ids: list[int] | None) -> Iterator[None]:
    """Other end-of-sequence tokens than those of the checkpoint; None is given to a model, not to a call."""
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ids
    yield
    model.generation_config.eos_token_id = own


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The union of what generation config, config and tokenizer name, where transformers takes the first of them."""
    named = (model.generation_config.eos_token_id, model.config.eos_token_id, EOS)
    return sorted({i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])})


def reference_generate(model: PreTrainedModel, prompt: list[int], params: SamplingParams) -> Reference:
    """Transformers' own greedy `generate`, for this prompt alone; told of all end tokens that any file names."""
    stop = [*([] if params.ignore_eos else end_tokens(model)), *params.stop_token_ids]
    options: dict[str, Any] = {"repetition_penalty": float(params.repetition_penalty)}
    if params.min_tokens and stop:
        options["min_new_tokens"] = params.min_tokens
    with eos_token_ids(model, stop or None), torch.inference_mode():
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else it is guessed from the padding token
            pad_token_id=0,
            use_cache=getattr(model.config, "sliding_window", None) != 1,  # such a cache would keep all, not none
            max_new_tokens=params.max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **options,
        )
    tokens = result.sequences[0, len(prompt) :].tolist()
    return Reference(tokens, torch.cat(result.scores), torch.cat(result.logits), frozenset(stop))


def assert_equal(output: GenerateOutput, expected: Reference, dtype: torch.dtype, tally: Counter[str]) -> None:
    """Token for token, or up to a place where the reference is all but undecided; logits too, as far as that."""
    name = str(dtype).removeprefix("torch.")
    tokens, reference = output.token_ids, expected.token_ids
    length = min(len(tokens), len(reference))
    first = next((place for place in range(length) if tokens[place] != reference[place]), None)
    tally[f"requests in {name}"] += 1
    tally[f"tokens in {name}"] += len(tokens) if first is None else first

    assert output.logprobs is not None
    logprobs = expected.logits.double().log_softmax(dim=-1)
    for place in range(length if first is None else first + 1):  # the logits at the first difference still compare
        for token_id, entry in output.logprobs[place].items():
            assert entry.logprob == pytest.approx(logprobs[place, token_id].item(), abs=LOGPROB_TOLERANCE[dtype])

    if first is None:
        assert tokens == reference, "one is longer than the other"
        assert output.finish_reason == expected.finish_reason
        ended_by = tokens[-1] if expected.finish_reason == "stop" else None
        assert output.outputs[0].stop_reason in (None, ended_by)
    else:
        scores = expected.scores[first].double()
        distance = (scores.max() - scores[tokens[first]]).item()
        assert distance < NEAR_TIE[dtype], f"token {first} is {tokens[first]}, not {reference[first]}, by {distance}"
        tally[f"near ties in {name}"] += 1


def assert_nothing_left(engine: LLMEngine) -> None:
    stats = engine.stats()
    assert engine.is_finished()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert not engine._loop.requests and not engine._finished


def draw_requests(
    draw: random.Random, lengths: list[int], fewest_tokens: int, most_tokens: int
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy requests of these prompt lengths; some stop late, at tokens of their own, or repeat unwillingly."""
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    params = []
    for _ in prompts:
        max_tokens = draw.randint(fewest_tokens, most_tokens)
        params.append(
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                logprobs=NUM_TOP,
                ignore_eos=draw.random() < 0.3,
                min_tokens=draw.randint(0, max_tokens) if draw.random() < 0.3 else 0,
                stop_token_ids=draw.sample(range(VOCAB_SIZE), 5) if draw.random() < 0.3 else None,
                repetition_penalty=draw.choice((0.9, 1.2, 2.0)) if draw.random() < 0.3 else 1.0,
            )
        )
    return prompts, params


def write_eos(path: Path, eos: int | list[int] | None) -> None:
    """What the checkpoint's generation_config.json says of the end of a sequence; None takes the file away."""
    file = path / "generation_config.json"
    if eos is None:
        file.unlink()
    else:
        file.write_text(json.dumps({"eos_token_id": eos, "pad_token_id": 0}))


def check(path: Path, draw: random.Random, dtype: torch.dtype, tight: bool, tally: Counter[str]) -> None:
    """Many requests through an engine of drawn block size and budget, each against `generate` by itself."""
    write_eos(path, draw.sample(range(VOCAB_SIZE), 15))
    if tight:  # many short ones that grow beside each other
        lengths, tokens = [1, 1, 1, 30, *(draw.randint(10, 20) for _ in range(8))], (12, 30)
    else:
        lengths, tokens = [1, 1, 1, draw.randint(70, 110), *(draw.randint(10, 50) for _ in range(5))], (1, 20)
    draw.shuffle(lengths)
    prompts, params = draw_requests(draw, lengths, *tokens)
    budget = draw.randint(5, 9) if tight else draw.randint(2, 9)
    assert all(length == 1 or length > budget for length in lengths), "every prompt that can be is chunked"
    if tight:
        # Room for the longest request, and hardly for anything beside it: whoever grows takes blocks from the last.
        block_size = draw.randint(1, 6)
        longest = max(len(prompt) + (p.max_tokens or 0) for prompt, p in zip(prompts, params, strict=True))
        num_blocks = -(-longest // block_size) + draw.randint(0, 2)
    else:
        block_size = draw.choice((draw.randint(1, 32), 32, 512))
        num_blocks = len(prompts) * -(-140 // block_size)
    engine = LLMEngine(
        model=path,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        block_size=block_size,
        num_gpu_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=draw.choice((3, 256)) if not tight else 256,
        watermark=0.0,
    )
    print(f"block_size={block_size} num_blocks={num_blocks} budget={budget}")
    outputs = engine.generate(prompts, params, use_tqdm=False)
    reference = reference_model(path, dtype)
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        assert_equal(output, reference_generate(reference, prompt, each), dtype, tally)
    assert_nothing_left(engine)
    preemptions = engine.stats().num_preemptions
    assert preemptions == sum(output.metrics.num_preemptions for output in outputs)
    assert (preemptions > 0) == tight, "what makes a case tight is that sequences are preempted"
    tally["preemptions"] += preemptions


def cases(by_default: int, when_slow: int) -> list[Any]:
    """Seeds of random checkpoints; the later ones are for `make test-all`."""
    return [
        *range(by_default),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(by_default, when_slow)),
    ]


@pytest.mark.parametrize("pressure", ["roomy", "tight"])
@pytest.mark.parametrize("seed", cases(8, 60))
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_tokens_are_those_of_transformers(
    tmp_path: Path, family: str, seed: int, pressure: str, tally: Counter[str]
) -> None:
    scaling = list(ROPE_SCALINGS.values())[seed % len(ROPE_SCALINGS)]
    make_engine_checkpoint(tmp_path, family, seed, torch.float64, rope_scaling=scaling)
    check(tmp_path, random.Random(f"{family} {seed} {pressure}"), torch.float64, pressure == "tight", tally)


@pytest.mark.parametrize("pressure", ["roomy", "tight"])
@pytest.mark.parametrize("seed", cases(2, 20))
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tokens_are_those_of_transformers(
    tmp_path: Path, family: str, seed: int, pressure: str, tally: Counter[str]
) -> None:
    make_engine_checkpoint(tmp_path, family, 100 + seed)
    check(tmp_path, random.Random(f"{family} {seed} {pressure}"), torch.float32, pressure == "tight", tally)


@pytest.mark.parametrize("pressure", ["roomy", "tight"])
@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_shorter_than_the_prompts(
    tmp_path: Path, family: str, window: int, pressure: str, tally: Counter[str]
) -> None:
    """In Qwen's layers from the second on, so that both kinds of layer stand beside each other."""
    options = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    make_engine_checkpoint(tmp_path, family, 200, torch.float64, num_hidden_layers=2, sliding_window=window, **options)
    check(tmp_path, random.Random(f"{family} {window} {pressure}"), torch.float64, pressure == "tight", tally)


@pytest.mark.parametrize("eos", [EOS, [EOS], list(range(3, VOCAB_SIZE, 7)), None], ids=["id", "one", "many", "no file"])
def test_the_end_of_a_sequence_is_where_the_checkpoint_says(
    tmp_path: Path, eos: int | list[int] | None, tally: Counter[str]
) -> None:
    """Without a generation_config.json both ask config.json, here for a token that comes up often."""
    common = 97
    make_engine_checkpoint(
        tmp_path, "qwen3", 300, torch.float64, eos_token_id=common if eos is None else EOS, rope_scaling=None
    )
    write_eos(tmp_path, eos)
    draw = random.Random(300)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 30))] for _ in range(24)]
    all_params = [
        SamplingParams(temperature=0, max_tokens=30, logprobs=NUM_TOP, ignore_eos=place % 4 == 3)
        for place in range(len(prompts))
    ]
    engine = LLMEngine(model=tmp_path, device="cpu", num_gpu_blocks=200)
    reference = reference_model(tmp_path, torch.float64)
    reasons = Counter()
    for prompt, params, output in zip(prompts, all_params, engine.generate(prompts, all_params, False), strict=True):
        assert_equal(output, reference_generate(reference, prompt, params), torch.float64, tally)
        assert output.outputs[0].stop_reason is None, "only stop tokens of the request itself are named"
        reasons[output.finish_reason] += 1
        if output.finish_reason == "stop":
            assert not params.ignore_eos
    if isinstance(eos, list) and len(eos) > 1:
        assert reasons["stop"] > 5 and reasons["length"] > 5
    assert_nothing_left(engine)
