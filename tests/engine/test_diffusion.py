"""Diffusion models write the tokens of an independent loop, written from LLaDA's published algorithm, in float64.

The loop below shares no code with the engine: its model is plain matrices (see `tests.models.llada`), it computes one
sequence at a time and all of it in every step. Random numbers it takes from the engine's own generator, by their keys.
"""

import json
import logging
import random
import resource
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mini_infer import LLM, GenerateOutput, SamplingParams, SparseConfig
from mini_infer.exceptions import InvalidConfigError, InvalidRequestError, UnsupportedModelError
from mini_infer.random import uniforms
from mini_infer.scheduler.plan import PlanDraft
from tests.models.llada import MASK, Cache, PlainLLaDA, make_llada_checkpoint
from tests.models.test_decoder import reference_model

from .checkpoints import EOS, make_engine_checkpoint, save_tokenizer
from .executors import runner_of


@dataclass(frozen=True)
class Model:
    path: Path
    plain: PlainLLaDA
    llm: LLM


def load(path: Path, seed: int) -> Model:
    make_llada_checkpoint(path, seed)
    save_tokenizer(path)
    return Model(path, PlainLLaDA(path), LLM(path, dtype="float64", device="cpu", max_num_seqs=8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tmp_path_factory.mktemp("llada"), 2)


def published(
    plain: "PlainLLaDA | Bidirectional",
    prompt: list[int],
    gen_length: int,
    steps: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    seed: int = 0,
    index: int = 0,
    threshold: float | None = None,
    factor: float | None = None,
    reuse: str | None = None,
    refresh_interval: int | None = None,
    share: float = 1.0,
    by_head: bool = True,
    delay: int = 0,
    mask: int = MASK,
) -> list[int]:
    """LLaDA's ``generate``; steps that would write nothing are not counted, and a mask is never an answer.

    With a threshold, a factor or reuse of keys and values, it is Fast-dLLM's; with a share of those, Sparse-dLLM's.
    """
    x = [*prompt, *[mask] * gen_length]
    num_blocks = -(-gen_length // block_length)
    round_ = 0
    for block in range(num_blocks):
        start = len(prompt) + block * block_length
        end = min(start + block_length, len(x))
        num_masks = end - start
        caches = [Cache(start, end if reuse == "dual" else len(x), share, by_head) for _ in range(2)]
        num_steps = max(1, steps // num_blocks + (block < steps % num_blocks))
        if threshold is not None or factor is not None:
            num_steps = num_masks
        for step in range(num_steps):
            num_transfer = num_masks // num_steps + (step < num_masks % num_steps)
            if num_transfer == 0 or mask not in x[start:end]:
                continue
            is_reused = reuse is not None and step > delay and (step - delay) % (refresh_interval or len(x)) != 0

            def logits_of(token_ids: list[int], cache: Cache, is_reused: bool = is_reused) -> torch.Tensor:
                computed = plain(token_ids, cache if reuse else None, is_reused)
                return torch.cat((torch.zeros(cache.start, 262), computed)) if is_reused else computed.clone()

            logits = logits_of(x, caches[0])
            if cfg_scale:
                without = logits_of([*[mask] * len(prompt), *x[len(prompt) :]], caches[1])
                logits = without + (cfg_scale + 1) * (logits - without)
            logits[:, mask] = -torch.inf
            probabilities = logits.softmax(dim=-1)
            confidence: dict[int, float] = {}
            answers: dict[int, int] = {}
            for i in range(start, end):
                if x[i] != mask:
                    continue
                if temperature == 0:
                    answers[i] = int(logits[i].argmax())
                else:
                    u = float(uniforms([seed], [index], [i + 2**32 * round_])[0])
                    cumulative = (logits[i] / temperature).softmax(dim=-1).cumsum(dim=-1)
                    answers[i] = int((cumulative <= u * cumulative[-1]).sum())
                confidence[i] = float(probabilities[i, answers[i]])
                if remasking == "random":
                    confidence[i] = float(uniforms([seed], [index], [i + 2**32 * round_ + 2**62])[0])
            best = sorted(confidence, key=lambda i: (-confidence[i], i))
            if threshold is not None:
                num_transfer = max(1, len([i for i in best if confidence[i] >= threshold]))
            if factor is not None:
                fits = [(n + 2) * (1 - confidence[i]) < factor for n, i in enumerate(best)]
                num_transfer = max([1, *(n + 1 for n, fit in enumerate(fits) if fit)])
            for i in best[:num_transfer]:
                x[i] = answers[i]
            round_ += 1
    return x[len(prompt) :]


CASES = [
    {"gen_length": 12, "steps": 12, "block_length": 12},
    {"gen_length": 12, "steps": 5, "block_length": 12},
    {"gen_length": 16, "steps": 8, "block_length": 4},
    {"gen_length": 13, "steps": 7, "block_length": 5},
    {"gen_length": 3, "steps": 30, "block_length": 2},
    {"gen_length": 12, "steps": 6, "block_length": 6, "cfg_scale": 0.5},
    {"gen_length": 9, "steps": 9, "block_length": 9, "cfg_scale": 2.0, "temperature": 0.7},
    {"gen_length": 12, "steps": 4, "block_length": 6, "remasking": "random"},
    {"gen_length": 11, "steps": 11, "block_length": 4, "remasking": "random", "temperature": 1.3},
    {"gen_length": 8, "steps": 3, "block_length": 8, "temperature": 0.3},
]


FASTER = [
    {"gen_length": 15, "block_length": 5, "threshold": 0.15},
    {"gen_length": 12, "threshold": 0.9},
    {"gen_length": 12, "block_length": 7, "factor": 1.9},
    {"gen_length": 16, "steps": 16, "block_length": 8, "kv_reuse": "prefix"},
    {"gen_length": 15, "steps": 9, "block_length": 6, "kv_reuse": "prefix", "refresh_interval": 2},
    {"gen_length": 12, "steps": 12, "block_length": 6, "kv_reuse": "prefix", "cfg_scale": 1.0, "temperature": 0.6},
    {"gen_length": 18, "block_length": 6, "kv_reuse": "prefix", "threshold": 0.2},
    {"gen_length": 16, "steps": 16, "block_length": 8, "kv_reuse": "dual"},
    {"gen_length": 15, "steps": 15, "block_length": 6, "kv_reuse": "dual", "refresh_interval": 3},
    {"gen_length": 12, "steps": 12, "block_length": 6, "kv_reuse": "dual", "cfg_scale": 1.0, "temperature": 0.6},
    {"gen_length": 16, "steps": 16, "block_length": 8, "sparse": {"retention_ratio": 0.5}},
    {"gen_length": 21, "steps": 21, "sparse": {"retention_ratio": 0.3, "default_block_len": 7, "head_select": False}},
    {"gen_length": 12, "steps": 9, "block_length": 6, "sparse": {"retention_ratio": 0.6, "delay_step": 0}},
    {"gen_length": 16, "steps": 16, "block_length": 8, "sparse": {"retention_ratio": 1.0, "delay_step": 2}},
    {"gen_length": 14, "block_length": 7, "threshold": 0.2, "refresh_interval": 2, "sparse": {"retention_ratio": 0.4}},
    {"gen_length": 12, "steps": 12, "cfg_scale": 0.5, "sparse": {"retention_ratio": 0.25, "default_block_len": 4}},
]


def sampling(case: dict[str, object], **more: object) -> SamplingParams:
    given = {"temperature": 0.0, "ignore_eos": True, **case, **more}
    if "sparse" in given:
        given["sparse_config"] = SparseConfig(**given.pop("sparse"))  # type: ignore[arg-type]
    return SamplingParams(**given)  # type: ignore[arg-type]


def as_published(case: dict[str, object]) -> dict[str, object]:
    """The same case in the words of the loop."""
    own = {"steps": 1, **case, "reuse": case.get("kv_reuse")}
    own.pop("kv_reuse", None)
    sparse = own.pop("sparse", None)
    if isinstance(sparse, dict):
        own["share"], own["delay"], own["reuse"] = sparse["retention_ratio"], sparse.get("delay_step", 1), "dual"
        own["by_head"] = sparse.get("head_select", True)
        own.setdefault("block_length", sparse.get("default_block_len", 32))
    return {"block_length": case["gen_length"], **own}


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.choice((1, 2, 7, 19, 40)))] for _ in range(count)]


def tokens(outputs: list[GenerateOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_tokens_are_those_of_the_published_loop_alone_and_in_a_batch(tmp_path: Path, seed: int) -> None:
    model = load(tmp_path, seed)
    given = prompts(len(CASES), 5)
    params = [sampling(case, seed=place) for place, case in enumerate(CASES)]
    expected = [
        published(model.plain, prompt, **case, seed=place)  # type: ignore[arg-type]
        for place, (prompt, case) in enumerate(zip(given, CASES, strict=True))
    ]
    alone = [model.llm.generate([prompt], one)[0].token_ids for prompt, one in zip(given, params, strict=True)]
    assert alone == expected
    assert tokens(model.llm.generate(given, params)) == expected
    twice = model.llm.generate([*given, *given], [*params, *params])
    assert tokens(twice) == [*expected, *expected]


@pytest.mark.parametrize("seed", [5, 6])
def test_what_is_faster_is_what_its_paper_says(tmp_path: Path, seed: int) -> None:
    model = load(tmp_path, seed)
    given = prompts(len(FASTER), 6)
    expected = []
    for place, (prompt, case) in enumerate(zip(given, FASTER, strict=True)):
        expected.append(published(model.plain, prompt, **as_published(case), seed=place))  # type: ignore[arg-type]
    params = [sampling(case, seed=place) for place, case in enumerate(FASTER)]
    assert tokens(model.llm.generate(given, params)) == expected
    some = list(zip(given, params, expected, strict=True))[seed % 3 :: 3]
    assert [model.llm.generate([prompt], one)[0].token_ids for prompt, one, _ in some] == [alone for *_, alone in some]


@pytest.mark.parametrize("seed", [6])
def test_what_is_always_computed_again_is_exact(tmp_path: Path, seed: int) -> None:
    model = load(tmp_path, seed)
    given = prompts(len(CASES), 7)
    exact = tokens(model.llm.generate(given, [sampling(case, seed=1) for case in CASES]))
    for more in ({"kv_reuse": "prefix"}, {"kv_reuse": "dual"}, {"sparse_config": SparseConfig(delay_step=0)}):
        always = [sampling(case, seed=1, refresh_interval=1, **more) for case in CASES]
        assert tokens(model.llm.generate(given, always)) == exact


@pytest.mark.parametrize("seed", [5])
def test_keeping_everything_is_dual_reuse(tmp_path: Path, seed: int) -> None:
    model = load(tmp_path, seed)
    given = prompts(len(CASES), seed)
    dual = [sampling(case, seed=1, kv_reuse="dual") for case in CASES]
    expected = tokens(model.llm.generate(given, dual))
    plain = [sampling(case, seed=1) for case in CASES]
    assert expected != tokens(model.llm.generate(given, plain)), "dual reuse changed nothing, so that nothing is tested"
    for head_select in (True, False):
        everything = SparseConfig(retention_ratio=1.0, delay_step=0, head_select=head_select)
        assert tokens(model.llm.generate(given, plain, sparse_configs=everything)) == expected
    disabled = [SparseConfig(enabled=False)] * len(given)
    assert tokens(model.llm.generate(given, plain, sparse_configs=disabled)) == tokens(model.llm.generate(given, plain))


def test_exact_sequences_hold_no_blocks_and_sparse_ones_few(model: Model) -> None:
    fields = {"gen_length": 64, "steps": 64, "block_length": 16}
    held = {}
    for name, more in {
        "exact": {},
        "prefix": {"kv_reuse": "prefix"},
        "dual": {"kv_reuse": "dual"},
        "sparse": {"sparse_config": SparseConfig(retention_ratio=0.25)},
        "guided": {"sparse_config": SparseConfig(retention_ratio=0.25), "cfg_scale": 1.0},
    }.items():
        request_id = model.llm.add_request([7] * 100, sampling(fields, **more))
        model.llm.step()
        stats = model.llm.stats()
        held[name] = (stats.num_blocks - stats.num_free_blocks) * model.llm.config.block_size
        model.llm.abort(request_id)
    # of 164 tokens, 16 are the block, and 148 outside of it
    assert held == {"exact": 0, "prefix": 176, "dual": 176, "sparse": 64, "guided": 128}
    with LLM(model.path, dtype="float64", device="cpu", num_gpu_blocks=5) as small:
        assert small.max_model_len == 256, "what is computed whole needs no cache"
        assert len(small.generate([[7] * 100], sampling(fields))[0].token_ids) == 64
        small.generate([[7] * 100], sampling(fields, sparse_config=SparseConfig(retention_ratio=0.25)))
        with pytest.raises(
            InvalidRequestError, match=r"of 164 tokens are to be reused, and there is room for 80; leave"
        ):
            small.generate([[7] * 100], sampling(fields, kv_reuse="dual"))


def test_codes_of_8_bits_are_for_what_is_reused(model: Model) -> None:
    params = sampling({"gen_length": 12, "steps": 12, "block_length": 6})
    given = prompts(3, 14)
    written = []
    for cache_dtype in ("auto", "int8"):
        with LLM(model.path, dtype="float32", device="cpu", kv_cache_dtype=cache_dtype) as llm:
            written.append(tokens(llm.generate(given, params)))
            llm.generate(given, replace(params, kv_reuse="dual"))
    assert written[0] == written[1]


def test_a_preempted_sequence_computes_all_again(model: Model) -> None:
    """Whatever it reused is gone; the rest is written as if it had not been there, and everybody else's as before."""
    fields = {"gen_length": 24, "steps": 24, "block_length": 12, "kv_reuse": "dual"}
    given = prompts(3, 12)
    expected = tokens(model.llm.generate(given, sampling(fields)))
    ids = [model.llm.add_request(prompt, sampling(fields)) for prompt in given]
    for _ in range(5):
        model.llm.step()
    scheduler = model.llm._loop.scheduler  # type: ignore[union-attr]
    first = scheduler.running[0]
    assert first.reuse is not None
    scheduler._preempt(first, PlanDraft(0, 0, 0))
    while not model.llm.is_finished():
        model.llm.step()
    outputs = [model.llm.get_output(one) for one in ids]
    assert [o.token_ids for o in outputs[1:] if o is not None] == expected[1:]
    assert outputs[0] is not None
    assert len(outputs[0].token_ids) == 24
    assert model.llm.stats().num_free_blocks == model.llm.stats().num_blocks


class Bidirectional:
    """A transformers model without its causal mask, as a plain one."""

    def __init__(self, path: Path, shift: int) -> None:
        self.model, self.shift = reference_model(path, torch.float64), shift

    def __call__(self, token_ids: list[int], cache: Cache | None = None, reuse: bool = False) -> torch.Tensor:
        seen = torch.zeros(1, 1, len(token_ids), len(token_ids), dtype=torch.float64)  # what is added to the scores
        with torch.inference_mode():
            logits = self.model(torch.tensor([token_ids]), attention_mask=seen, use_cache=False).logits[0].clone()
        return torch.cat((logits[:1], logits[:-1])) if self.shift else logits


@pytest.mark.parametrize(
    ("family", "architecture", "model_type", "shift"),
    [("qwen3", "A2DQwen3LMHeadModel", "a2d-qwen3", 0), ("qwen2", "DreamModel", "Dream", 1)],
)
def test_other_families(tmp_path: Path, family: str, architecture: str, model_type: str, shift: int) -> None:
    make_engine_checkpoint(
        tmp_path, family, 3, torch.float64, use_sliding_window=False, sliding_window=None, rope_scaling=None
    )
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    plain = Bidirectional(tmp_path, shift)
    names: dict[str, object] = {"architectures": [architecture], "model_type": model_type}
    mask = MASK
    if shift:
        names["mask_token_id"] = MASK
    else:  # whose config leaves it to the tokenizer
        mask = save_tokenizer(tmp_path, mask_token="<|mask|>").mask_token_id
    file.write_text(json.dumps({**fields, **names}), encoding="utf-8")
    given = prompts(len(CASES), 5)
    params = [sampling(case, seed=place) for place, case in enumerate(CASES)]
    with LLM(tmp_path, dtype="float64", device="cpu") as llm:
        computed = tokens(llm.generate(given, params))
    for place, (prompt, case) in enumerate(zip(given, CASES, strict=True)):
        assert computed[place] == published(plain, prompt, **case, seed=place, mask=mask)  # type: ignore[arg-type]


def dream(
    plain: Bidirectional,
    prompt: list[int],
    alg: str,
    gen_length: int,
    steps: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    alg_temp: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """Dream's ``diffusion_generate``; passes that would write nothing are left out where that is known before."""
    x = [*prompt, *[MASK] * gen_length]
    times = torch.linspace(1, 1e-3, steps + 1)
    round_ = 0
    for i in range(steps):
        masked = [place for place, token in enumerate(x) if token == MASK]
        t, s = float(times[i]), float(times[i + 1])
        share = 1 - s / t if i < steps - 1 else 1.0
        count = int(len(masked) * share)
        if not masked or (alg != "origin" and count == 0):
            continue
        logits = plain(x)
        answers, confidence, chance = {}, {}, {}
        for place in masked:
            row = logits[place]
            row[MASK] = -torch.inf
            row = row / temperature if temperature else row
            ranked, order = row.sort(descending=True)
            before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
            row[order[before > top_p]] = -torch.inf
            if top_k:
                row[row < ranked[top_k - 1]] = -torch.inf
            p = row.softmax(-1)
            u = float(uniforms([seed], [0], [place + 2**32 * round_])[0])
            answers[place] = int((p.cumsum(-1) <= u * p.sum()).sum()) if temperature else int(p.argmax())
            best = p.sort(descending=True).values
            confidence[place] = {
                "origin": 0.0,
                "maskgit_plus": float(p[answers[place]]),
                "topk_margin": float(best[0] - best[1]),
                "entropy": float((p * torch.log(p + 1e-10)).sum()),
            }[alg]
            chance[place] = float(uniforms([seed], [0], [place + 2**32 * round_ + 2**62])[0])
        if alg == "origin":
            chosen = [place for place in masked if chance[place] < share]
        elif alg_temp:
            weights = torch.tensor([confidence[place] for place in masked], dtype=torch.float64) / alg_temp
            races = weights.softmax(-1) / -torch.tensor([chance[place] for place in masked], dtype=torch.float64).log()
            chosen = [masked[j] for j in races.topk(count).indices.tolist()]  # as torch.multinomial draws
        else:
            chosen = sorted(masked, key=lambda place: (-confidence[place], place))[:count]
        for place in chosen:
            x[place] = answers[place]
        round_ += 1
    return x[len(prompt) :]


ALGS = [
    {"alg": "origin", "gen_length": 12, "steps": 6},
    {"alg": "origin", "gen_length": 9, "steps": 20, "temperature": 0.8},
    {"alg": "maskgit_plus", "gen_length": 12, "steps": 12},
    {"alg": "maskgit_plus", "gen_length": 12, "steps": 5, "temperature": 0.7, "top_p": 0.8},
    {"alg": "topk_margin", "gen_length": 13, "steps": 7},
    {"alg": "topk_margin", "gen_length": 10, "steps": 30, "temperature": 1.2, "alg_temp": 0.3},
    {"alg": "entropy", "gen_length": 12, "steps": 6},
    {"alg": "entropy", "gen_length": 12, "steps": 9, "temperature": 0.5, "top_k": 20, "alg_temp": 1.0},
]


@pytest.mark.parametrize("seed", [3, 8])
def test_dreams_own_algorithms(tmp_path: Path, seed: int) -> None:
    make_engine_checkpoint(
        tmp_path, "qwen2", seed, torch.float64, use_sliding_window=False, sliding_window=None, rope_scaling=None
    )
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    plain = Bidirectional(tmp_path, 1)
    names = {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": MASK}
    file.write_text(json.dumps({**fields, **names}), encoding="utf-8")
    given = prompts(len(ALGS), seed)
    params = [sampling(case, seed=place) for place, case in enumerate(ALGS)]
    with LLM(tmp_path, dtype="float64", device="cpu") as llm:
        computed = tokens(llm.generate(given, params))
        exact = llm.generate(given[:2], sampling({"gen_length": 12, "steps": 12}))
        always = sampling({"gen_length": 12, "steps": 12, "kv_reuse": "dual", "refresh_interval": 1})
        assert tokens(llm.generate(given[:2], always)) == tokens(exact)
    for place, (prompt, case) in enumerate(zip(given, ALGS, strict=True)):
        assert computed[place] == dream(plain, prompt, **case, seed=place), case  # type: ignore[arg-type]


def test_completions_are_drawn_apart(model: Model) -> None:
    (prompt,) = prompts(1, 8)
    case = {"gen_length": 10, "steps": 5, "block_length": 5, "temperature": 1.0}
    (output,) = model.llm.generate([prompt], sampling(case, n=3, seed=4))
    expected = [published(model.plain, prompt, **case, seed=4, index=i) for i in range(3)]  # type: ignore[arg-type]
    assert [completion.token_ids for completion in output.outputs] == expected


def test_an_answer_ends_where_the_full_run_has_its_first_end(model: Model) -> None:
    num_early = 0
    for place, prompt in enumerate(prompts(12, 11)):
        case = {"gen_length": 24, "steps": 12, "block_length": 8, "temperature": 1.0, "seed": place}
        full = published(model.plain, prompt, **case)  # type: ignore[arg-type]
        stops = random.Random(place).sample(full, 2)
        end = min(full.index(stop) for stop in stops)
        (output,) = model.llm.generate([prompt], sampling(case, stop_token_ids=stops))
        assert output.token_ids == full[: end + 1]
        assert output.finish_reason == "stop"
        num_early += end < 16
    assert num_early, "no answer ended before its last block"


def test_the_written_prefix_streams(model: Model) -> None:
    (prompt,) = prompts(1, 3)
    params = sampling({"gen_length": 16, "steps": 8, "block_length": 8})
    (whole,) = model.llm.generate([prompt], params)
    assert "".join(model.llm.stream(prompt, params)) == whole.text


def test_a_stop_string_ends_the_text(model: Model) -> None:
    (prompt,) = prompts(1, 21)
    params = {"gen_length": 16, "steps": 16, "block_length": 4}
    (whole,) = model.llm.generate([prompt], sampling(params))
    stop = whole.text[3:5]
    (output,) = model.llm.generate([prompt], sampling(params, stop=stop))
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_writing_step(model: Model) -> None:
    (prompt,) = prompts(1, 2)
    (output,) = model.llm.generate([prompt], sampling({"gen_length": 6, "steps": 1}, logprobs=2))
    logits = model.plain([*prompt, *[MASK] * 6])[len(prompt) :]
    logits[:, MASK] = -torch.inf
    expected = logits.log_softmax(dim=-1)
    assert output.logprobs is not None
    for place, (token_id, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert entry[token_id].logprob == pytest.approx(
            float(expected[place, token_id]), abs=1e-5
        )  # angles are float32
        assert set(entry) == set(expected[place].topk(2).indices.tolist())


def test_logits_in_parts_draw_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(5, 17)
    params = [sampling(CASES[i], seed=i, logprobs=i) for i in (2, 5, 6, 8, 9)]
    expected = model.llm.generate(given, params)
    monkeypatch.setattr("mini_infer.executor.runner._LOGITS_BYTES", 262 * 8 * 3)
    parts = model.llm.generate(given, params)
    assert tokens(parts) == tokens(expected)
    for one, other in zip(parts, expected, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        for entry, other_entry in zip(one.logprobs, other.logprobs, strict=True):
            assert {i: x.logprob for i, x in entry.items()} == pytest.approx(
                {i: x.logprob for i, x in other_entry.items()}
            )


def test_aborted_requests_leave_the_others_alone(model: Model) -> None:
    given = prompts(6, 29)
    params = sampling({"gen_length": 12, "steps": 12})
    expected = tokens(model.llm.generate(given, params))
    ids = [model.llm.add_request(prompt, params) for prompt in given]
    for _ in range(3):
        model.llm.step()
    for aborted in ids[::2]:
        model.llm.abort(aborted)
    while not model.llm.is_finished():
        model.llm.step()
    outputs = [model.llm.get_output(one) for one in ids]
    for place, output in enumerate(outputs):
        assert output is not None
        assert output.finish_reason == ("abort" if place % 2 == 0 else "length")
        if place % 2:
            assert output.token_ids == expected[place]
    stats = model.llm.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks == stats.num_blocks


def test_a_small_budget_and_few_blocks_change_nothing(model: Model) -> None:
    given = prompts(7, 31)
    params = [sampling(CASES[i], seed=i) for i in (0, 2, 5, 3, 6, 7, 9)]
    expected = tokens(model.llm.generate(given, params))
    with LLM(
        model.path,
        dtype="float64",
        device="cpu",
        max_num_seqs=3,
        max_model_len=64,
        max_num_batched_tokens=128,
        num_gpu_blocks=40,
        block_size=4,
    ) as small:
        assert tokens(small.generate(given, params)) == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gen_length": 10_000}, "gen_length must be an integer from 1 to 8192, got 10000"),
        ({"gen_length": 0}, "gen_length must be an integer from 1 to 8192, got 0"),
        ({"steps": 0}, "steps must be an integer from 1 to 8192, got 0"),
        ({"block_length": 0}, "block_length must be an integer of at least 1, got 0"),
        ({"cfg_scale": -1.0}, "cfg_scale must be a finite number of at least 0, got -1.0"),
        ({"threshold": 1.5}, "threshold must be a finite number of at least 0 and at most 1, got 1.5"),
        ({"factor": 0.0}, "factor must be a finite number of more than 0, got 0.0"),
        ({"kv_reuse": "suffix"}, "kv_reuse must be one of 'prefix', 'dual', got 'suffix'"),
        ({"alg": "greedy"}, "alg must be one of 'origin', 'maskgit_plus', 'topk_margin', 'entropy', got 'greedy'"),
        ({"alg_temp": -1}, "alg_temp must be a finite number of at least 0, got -1"),
        ({"sparse_config": 0.5}, r"sparse_config must be a SparseConfig, got 0.5; SparseConfig\(retention_ratio=0.5\)"),
        ({"sparse_config": {"ratio": 0.5}}, "SparseConfig has no option 'ratio'"),
        (
            {"sparse_config": {"retention_ratio": 0}},
            "retention_ratio must be a finite number of more than 0 and at most",
        ),
        ({"sparse_config": {"retention_ratio": 1.1}}, "retention_ratio must be .* at most 1, got 1.1"),
        ({"sparse_config": {"delay_step": -1}}, "delay_step must be an integer of at least 0, got -1"),
        ({"sparse_config": {"default_block_len": 0}}, "default_block_len must be an integer of at least 1, got 0"),
        ({"sparse_config": {"head_select": 1}}, "head_select must be True or False, got 1"),
        ({"sparse_config": {"enabled": "yes"}}, "enabled must be True or False, got 'yes'"),
        ({"refresh_interval": 0}, "refresh_interval must be an integer of at least 1, got 0"),
        ({"remasking": "x"}, "remasking must be one of 'low_confidence', 'random', got 'x'"),
    ],
)
def test_bad_values_are_refused_at_once(option: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gen_length": 250}, "gen_length=250, but behind a prompt of 10 tokens there is room for 246"),
        ({"threshold": 0.9, "steps": 5}, "steps=5 beside threshold"),
        ({"threshold": 0.9, "factor": 1.0}, "factor=1.0 beside threshold"),
        ({"factor": 1.0, "remasking": "random"}, "remasking='random' beside factor"),
        ({"refresh_interval": 4}, "refresh_interval without kv_reuse"),
        ({"alg": "entropy", "block_length": 4}, "block_length=4 beside alg='entropy', which writes all"),
        ({"alg": "origin", "remasking": "random"}, "remasking='random' beside alg='origin'"),
        ({"alg": "origin", "alg_temp": 0.5}, "alg_temp=0.5 needs an alg that goes by confidence"),
        ({"kv_reuse": "dual", "sparse_config": {}}, "kv_reuse='dual' beside sparse_config"),
        ({"min_tokens": 1}, "min_tokens=1: a diffusion model writes in any order"),
        ({"presence_penalty": 1.0}, "presence_penalty=1.0: a diffusion model"),
        ({"prompt_logprobs": 1}, "prompt_logprobs=1: a diffusion model"),
        ({"structured_outputs": {"regex": "a*"}}, "structured_outputs=.*: a diffusion model"),
    ],
)
def test_what_a_canvas_cannot_have_is_refused(model: Model, option: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        model.llm.generate([[7] * 10], sampling({}, **option))
    with pytest.raises(InvalidRequestError, match="no beams"):
        model.llm.beam_search([[7] * 10], 2, 5)


def test_a_checkpoint_may_name_its_block_length(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(model.path, path)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": False, "block_length": 5}))
    with LLM(path, dtype="float64", device="cpu") as llm:
        by_itself = llm.generate([[7, 8, 9]], max_tokens=20)[0]
    blocks = sampling({"gen_length": 20, "block_length": 5}, ignore_eos=False)
    assert by_itself.token_ids == model.llm.generate([[7, 8, 9]], blocks)[0].token_ids
    whole = sampling({"gen_length": 20}, ignore_eos=False)
    assert by_itself.token_ids != model.llm.generate([[7, 8, 9]], whole)[0].token_ids


def test_more_than_a_step_can_compute_is_refused(model: Model) -> None:
    with LLM(model.path, dtype="float64", device="cpu", max_num_batched_tokens=64) as llm:
        with pytest.raises(InvalidRequestError, match=r"are 65 tokens, .* max_num_batched_tokens is 64"):
            llm.generate([[7] * 45], sampling({"gen_length": 20}))
        with pytest.raises(InvalidRequestError, match="are 66 tokens with cfg_scale"):
            llm.generate([[7] * 13], sampling({"gen_length": 20, "cfg_scale": 1.0}))
        (output,) = llm.generate([[7] * 44], sampling({"gen_length": 20}))
        assert len(output.token_ids) == 20
    with pytest.raises(InvalidConfigError, match="enable_prefix_caching=True: in a diffusion model"):
        LLM(model.path, device="cpu", enable_prefix_caching=True)


def test_lengths_that_are_not_given(model: Model) -> None:
    assert len(model.llm.generate([[7]], sampling({"steps": 2}))[0].token_ids) == 128
    assert len(model.llm.generate([[7] * 200], sampling({"steps": 2}))[0].token_ids) == 56
    (output,) = model.llm.generate([[7]], sampling({"steps": 2}), max_tokens=9)
    assert len(output.token_ids) == 9


def test_an_autoregressive_model_refuses_them(tmp_path: Path) -> None:
    with LLM(make_engine_checkpoint(tmp_path), device="cpu") as llm:
        sparse = SparseConfig(enabled=False)
        with pytest.raises(InvalidRequestError, match=r"sparse_config=SparseConfig\(.*\) steers a diffusion"):
            llm.generate(["x", "y"], SamplingParams(), sparse_configs=[sparse, sparse])
        with pytest.raises(InvalidRequestError, match="2 prompts but 1 sparse_configs; give one for all"):
            llm.generate(["x", "y"], SamplingParams(), sparse_configs=[sparse])
        with pytest.raises(InvalidRequestError, match="sparse_configs must be a SparseConfig or a list of them, got 5"):
            llm.generate(["x", "y"], SamplingParams(), sparse_configs=5)  # type: ignore[arg-type]
        for name, value in {"gen_length": 64, "steps": 8, "cfg_scale": 0.0, "remasking": "random"}.items():
            with pytest.raises(InvalidRequestError, match=f"{name}={value!r} steers a diffusion .* use max_tokens"):
                llm.generate("x", SamplingParams(**{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_type", "sequential"), ("alibi", True), ("rope", False), ("layer_norm_type", "low_precision"),
     ("attention_layer_norm", True), ("include_qkv_bias", True), ("scale_logits", True), ("activation_type", "swiglu")],
)  # fmt: skip
def test_fields_that_are_not_implemented_are_named(tmp_path: Path, field: str, value: object) -> None:
    path = make_llada_checkpoint(tmp_path, 0, **{field: value})
    save_tokenizer(path)
    with pytest.raises(UnsupportedModelError, match=f"{field} must be"):
        LLM(path, device="cpu")


def test_nobody_warns_of_a_model_that_only_mini_infer_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_llada_checkpoint(tmp_path, 2)
    save_tokenizer(path)
    LLM(path, device="cpu").close()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_end_of_sequence_ends_an_answer(tmp_path: Path) -> None:
    path = make_llada_checkpoint(tmp_path, 6, weight_tying=False)
    save_tokenizer(path)
    plain = PlainLLaDA(path)
    with LLM(path, device="cpu") as llm:
        bias = {EOS: 5.0}
        (full,) = llm.generate([[1, 2, 3]], sampling({"gen_length": 32, "steps": 32}, logit_bias=bias))
        (short,) = llm.generate(
            [[1, 2, 3]], sampling({"gen_length": 32, "steps": 32}, logit_bias=bias, ignore_eos=False)
        )
    assert len(full.token_ids) == 32
    assert EOS in full.token_ids
    assert short.token_ids == full.token_ids[: full.token_ids.index(EOS) + 1]
    assert short.finish_reason == "stop"
    assert plain.config["mask_token_id"] not in full.token_ids


@pytest.mark.parametrize(("count", "gen_length"), [(2, 150), pytest.param(32, 1024, marks=pytest.mark.slow)])
def test_a_large_batch_with_a_large_vocabulary_needs_little_memory_for_logits(
    tmp_path: Path, count: int, gen_length: int
) -> None:
    """Canvases of a vocabulary of 126,464 tokens: all logits of 32 times 1,024 masks at once would be 15 GiB."""
    vocab = 126_464
    small = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "d_model": 16, "mlp_hidden_size": 16, "weight_tying": True}
    make_llada_checkpoint(
        tmp_path, 0, torch.float32, vocab_size=vocab, embedding_size=vocab, max_sequence_length=2048, **small
    )
    save_tokenizer(tmp_path)
    with LLM(tmp_path, device="cpu", max_num_batched_tokens=40_000, num_gpu_blocks=2400) as llm:
        decoder = runner_of(llm).model
        compute, sizes = decoder.compute_logits, list[int]()

        def measured(hidden: torch.Tensor) -> torch.Tensor | None:
            logits = compute(hidden)
            assert logits is not None
            sizes.append(logits.nbytes)
            return logits

        decoder.compute_logits = measured  # type: ignore[method-assign]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        params = sampling({"gen_length": gen_length, "steps": 1, "temperature": 1.0})
        outputs = llm.generate([[7] * 16] * count, params)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert [len(output.token_ids) for output in outputs] == [gen_length] * count
    assert sum(sizes) == count * gen_length * vocab * 4
    assert max(sizes) <= 1 << 27
    print(f"largest logits {max(sizes) / 2**20:.0f} MiB; the process grew by {grown / 2**20:.0f} MiB")
    assert grown < 1 << 30
