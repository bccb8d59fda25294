"""Diffusion models that see in blocks write the tokens of an independent loop, in float64.

The loop shares no code with the engine: its model is transformers' Qwen3 under a mask of blocks, and it keeps nothing
from one step to the next. So what is equal to it is also equal to computing everything again.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mini_infer import LLM, GenerateOutput, SamplingParams
from mini_infer.exceptions import (
    InvalidCheckpointError,
    InvalidConfigError,
    InvalidRequestError,
    UnsupportedModelError,
)
from mini_infer.random import uniforms
from tests.models.test_decoder import reference_model

from .checkpoints import make_engine_checkpoint, save_tokenizer

MASK = 259


class SeesInBlocks:
    """A transformers model under a mask of blocks: logits of every token of one sequence."""

    def __init__(self, path: Path, span: int) -> None:
        self.model, self.span = reference_model(path, torch.float64), span

    def __call__(self, token_ids: list[int]) -> torch.Tensor:
        blocks = torch.arange(len(token_ids)) // self.span
        hidden = blocks[None, :] > blocks[:, None]  # keys behind the query's block
        added = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None]
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([token_ids]), attention_mask=added, use_cache=False).logits
        return logits[0].clone()


def published(
    plain: SeesInBlocks,
    prompt: list[int],
    gen_length: int,
    steps: int = 1,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    factor: float | None = None,
    seed: int = 0,
    index: int = 0,
) -> list[int]:
    """Block after block of the grid that begins with the prompt's first token: mask, predict, keep, repeat."""
    x = [*prompt, *[MASK] * gen_length]
    borders = [*range(len(prompt) // plain.span * plain.span, len(x), plain.span), len(x)]
    num_blocks = len(borders) - 1
    round_ = 0
    for number in range(num_blocks):
        places = [i for i in range(borders[number], borders[number + 1]) if i >= len(prompt)]
        num_steps = min(max(1, steps // num_blocks + (number < steps % num_blocks)), len(places))
        step = 0
        while any(x[i] == MASK for i in places):
            logits = plain(x)
            logits[:, MASK] = -torch.inf
            sure: dict[int, float] = {}
            token: dict[int, int] = {}
            for i in places:
                if x[i] != MASK:
                    continue
                if temperature == 0:
                    token[i] = int(logits[i].argmax())
                else:
                    u = float(uniforms([seed], [index], [i + 2**32 * round_])[0])
                    cumulative = (logits[i] / temperature).softmax(dim=-1).cumsum(dim=-1)
                    token[i] = int((cumulative <= u * cumulative[-1]).sum())
                sure[i] = float(logits[i].softmax(dim=-1)[token[i]])
                if remasking == "random":
                    sure[i] = float(uniforms([seed], [index], [i + 2**32 * round_ + 2**62])[0])
            best = sorted(sure, key=lambda i: (-sure[i], i))
            if threshold is not None:
                count = max(1, len([i for i in best if sure[i] >= threshold]))
            elif factor is not None:
                count = max([1, *(n for n, i in enumerate(best, 1) if (n + 1) * (1 - sure[i]) < factor)])
            else:
                count = len(places) // num_steps + (step < len(places) % num_steps)
            for i in best[:count]:
                x[i] = token[i]
            step += 1
            round_ += 1
    return x[len(prompt) :]


CASES: list[dict[str, object]] = [
    {"gen_length": 12, "steps": 12},
    {"gen_length": 17, "steps": 6},
    {"gen_length": 3, "steps": 30},
    {"gen_length": 1},
    {"gen_length": 14, "steps": 7, "temperature": 0.8},
    {"gen_length": 11, "steps": 9, "remasking": "random", "temperature": 1.2},
    {"gen_length": 16, "threshold": 0.1},
    {"gen_length": 13, "factor": 1.9},
    {"gen_length": 25, "steps": 5},
    {"gen_length": 8, "steps": 8, "temperature": 0.3},
]


def make(path: Path, seed: int, span: int, architecture: str = "SDARForCausalLM", model_type: str = "sdar") -> Path:
    """A Qwen3 that sees in blocks, whose shape and weights are drawn from ``seed``."""
    make_engine_checkpoint(
        path, "qwen3", seed, torch.float64, use_sliding_window=False, sliding_window=None, rope_scaling=None
    )
    write(path, architectures=[architecture], model_type=model_type, mask_token_id=MASK, block_size=span)
    return path


def write(path: Path, **fields: object) -> None:
    file = path / "config.json"
    before = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**before, **fields}), encoding="utf-8")


def plain_of(path: Path, span: int) -> SeesInBlocks:
    """Its model as transformers knows it, without what makes it one of diffusion."""
    kept = (path / "config.json").read_text(encoding="utf-8")
    write(path, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    plain = SeesInBlocks(path, span)
    (path / "config.json").write_text(kept, encoding="utf-8")
    return plain


def sampling(case: Mapping[str, object], **more: object) -> SamplingParams:
    steps = {} if {"threshold", "factor"} & case.keys() else {"steps": 1}
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **steps, **case, **more})  # type: ignore[arg-type]


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.choice((1, 3, 4, 7, 16, 19, 33)))] for _ in range(count)]


def tokens(outputs: list[GenerateOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def expect(plain: SeesInBlocks, given: list[list[int]]) -> list[list[int]]:
    cases = enumerate(zip(given, CASES, strict=True))
    return [published(plain, prompt, seed=place, **case) for place, (prompt, case) in cases]  # type: ignore[arg-type]


ALL = [sampling(case, seed=place) for place, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sdar"), 5, 4)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    return expect(plain_of(path, 4), prompts(len(CASES), 1))


@pytest.mark.parametrize(
    ("seed", "span", "names"),
    [(1, 4, ()), (3, 7, ()), (4, 32, ()), (6, 8, ("A2DQwen3LMHeadModel", "a2d-qwen3"))],
)
def test_tokens_are_those_of_the_loop_alone_and_in_a_batch_of_twenty(
    tmp_path: Path, seed: int, span: int, names: tuple[str, ...]
) -> None:
    path, given = make(tmp_path, seed, span, *names), prompts(len(CASES), seed)
    wanted = expect(plain_of(path, span), given)
    with LLM(path, dtype="float64", device="cpu", max_num_seqs=20) as llm:
        assert [tokens(llm.generate([p], one))[0] for p, one in zip(given, ALL, strict=True)] == wanted
        assert tokens(llm.generate([*given, *given], [*ALL, *ALL])) == wanted * 2
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemptions_and_small_steps_change_nothing(path: Path, expected: list[list[int]], mode: str) -> None:
    with LLM(
        path,
        dtype="float64",
        device="cpu",
        max_num_seqs=6,
        max_model_len=64,
        max_num_batched_tokens=13,  # prompts come in parts, which end with a block
        num_gpu_blocks=25,
        num_cpu_blocks=8,
        block_size=3,  # nor do KV blocks end with one
        preemption_mode=mode,
    ) as llm:
        assert tokens(llm.generate(prompts(len(CASES), 1), ALL)) == expected
        stats = llm.stats()
        assert stats.num_preemptions > 0
        assert stats.num_swap_preemptions > 0 or mode == "recompute"
        assert stats.num_free_blocks == stats.num_blocks


def test_prefixes_are_shared_at_the_end_of_blocks(path: Path, expected: list[list[int]]) -> None:
    given = prompts(len(CASES), 1)
    with LLM(path, dtype="float64", device="cpu", enable_prefix_caching=True, block_size=8) as llm:
        assert tokens(llm.generate(given, ALL)) == expected
        assert tokens(llm.generate(given, ALL)) == expected
        assert llm.stats().num_prefix_hits >= sum(len(prompt) // 8 * 8 for prompt in given)
        # A conversation goes on: what was written is found again, up to the last block that is whole.
        prompt, answer = max(zip(given, expected, strict=True), key=lambda pair: len(pair[1]))
        longer = [*prompt, *answer, 5, 6, 7]
        (output,) = llm.generate([longer], sampling({"gen_length": 6, "steps": 6}))
        assert output.token_ids == published(plain_of(path, 4), longer, 6, 6)
        assert output.num_cached_tokens >= (len(prompt) + len(answer) - 4) // 8 * 8 > len(prompt)
        ends = [whole[len(whole) // 2] for whole in expected]
        stopped = [sampling(case, seed=i, stop_token_ids=[ends[i]]) for i, case in enumerate(CASES)]
        for place, output in enumerate(llm.generate(given, stopped)):
            assert output.token_ids == expected[place][: expected[place].index(ends[place]) + 1]
            assert output.finish_reason == "stop"


def test_a_block_is_computed_and_nothing_before_it(path: Path) -> None:
    """Of 36 tokens of prompt and 16 of answer, one a step: the prompt with the first block, in each step the block, and
    when it is full once more with the next one."""
    with LLM(path, dtype="float64", device="cpu") as llm:
        llm.generate([[7] * 36], sampling({"gen_length": 16, "steps": 16}))
        stats = llm.stats()
    assert stats.num_steps == 16
    assert stats.num_prompt_tokens == (36 + 4) + 3 * 4 + 3 * (8 + 3 * 4)


def test_aborted_requests_leave_the_others_alone(path: Path, expected: list[list[int]]) -> None:
    with LLM(path, dtype="float64", device="cpu") as llm:
        ids = [llm.add_request(p, one) for p, one in zip(prompts(len(CASES), 1), ALL, strict=True)]
        for number in range(4):
            llm.step()
            llm.abort(ids[2 * number])
        while not llm.is_finished():
            llm.step()
        outputs = [llm.get_output(one) for one in ids]
        assert llm.stats().num_free_blocks == llm.stats().num_blocks
    for place, output in enumerate(outputs):
        assert output is not None
        assert output.token_ids == expected[place][: len(output.token_ids)]
        assert output.finish_reason == "abort" or output.token_ids == expected[place]
    assert [output.finish_reason for output in outputs if output is not None].count("abort") >= 3


def test_completions_and_streams(path: Path) -> None:
    plain, (prompt,) = plain_of(path, 4), prompts(1, 9)
    case = {"gen_length": 14, "steps": 7, "temperature": 1.0}
    with LLM(path, dtype="float64", device="cpu") as llm:
        (output,) = llm.generate([prompt], sampling(case, n=3, seed=4))
        wanted = [published(plain, prompt, seed=4, index=i, **case) for i in range(3)]  # type: ignore[arg-type]
        assert [completion.token_ids for completion in output.outputs] == wanted
        params = sampling(case, seed=4)
        assert "".join(llm.stream(prompt, params)) == output.outputs[0].text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_length": 8}, "block_length=8, but this model sees in blocks of 4"),
        ({"kv_reuse": "prefix"}, "kv_reuse='prefix': this model sees in blocks"),
        ({"kv_reuse": "dual", "refresh_interval": 2}, "kv_reuse='dual': this model sees in blocks"),
        ({"sparse_config": {}}, "sparse_config is not implemented for models that see in blocks"),
        ({"cfg_scale": 0.5}, "cfg_scale=0.5 is not implemented for models that see in blocks"),
    ],
)
def test_what_blocks_do_not_have_is_refused(path: Path, option: dict[str, object], message: str) -> None:
    with LLM(path, device="cpu") as llm, pytest.raises(InvalidRequestError, match=message):
        llm.generate([[7] * 5], sampling({"gen_length": 4}, **option))


def test_sizes_that_do_not_fit_a_block_are_refused(path: Path) -> None:
    message = r"a block has 4 tokens, .* max_num_batched_tokens is 3"
    with LLM(path, device="cpu", max_num_batched_tokens=3) as llm, pytest.raises(InvalidRequestError, match=message):
        llm.generate([[7] * 5], sampling({"gen_length": 4}))
    with pytest.raises(InvalidConfigError, match="sees in blocks of 4 tokens, and a KV block of block_size=6 ends"):
        LLM(path, device="cpu", enable_prefix_caching=True, block_size=6)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"block_size": None}, InvalidCheckpointError, "lacks block_size"),
        ({"block_size": 0}, InvalidCheckpointError, "block_size must be an integer of at least 1; got 0"),
        ({"block_size": "4"}, InvalidCheckpointError, "block_size must be an integer"),
        ({"mask_token_id": 10**6}, InvalidCheckpointError, "mask_token_id must be a token"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act must be 'silu'"),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 0},
         UnsupportedModelError, "sliding_window must not be used"),
        ({"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe"}, UnsupportedModelError, "not supported"),
    ],
)  # fmt: skip
def test_configs_that_are_not_implemented_are_named(
    tmp_path: Path, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    write(make(tmp_path, 0, 4), **fields)
    with pytest.raises(error, match=message):
        LLM(tmp_path, device="cpu")


@pytest.mark.parametrize("span", [8, None])
def test_a_conversion_is_told_apart_by_its_block_size(tmp_path: Path, span: int | None) -> None:
    path = make(tmp_path, 6, 8, "A2DQwen3LMHeadModel", "a2d-qwen3")
    write(path, block_size=span)
    save_tokenizer(path)
    with LLM(path, device="cpu") as llm:
        assert llm.model_config.diffusion is not None
        assert llm.model_config.diffusion.span == span
