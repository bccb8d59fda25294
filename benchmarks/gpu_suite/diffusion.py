"""Diffusion on random weights: what a canvas costs where all tokens see each other, and in blocks; beside the published
sampler, whose tokens a small model has to write."""

import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.diffusion import Peer, make_llada
from benchmarks.gpu_suite.engine import make_engine, weight_bytes
from benchmarks.gpu_suite.figure import Context, Figure, untaken
from benchmarks.measure import DEVICE, matrix_peak
from mini_infer import LLM, SamplingParams, SparseConfig

BATCHES = (1, 16)


def canvases(context: Context) -> Iterator[Figure]:
    """What answers cost, then the published sampler."""
    yield from _ways(context)
    yield from _published(context)
    yield from _equality(context)


def _ways(context: Context) -> Iterator[Figure]:
    """Tokens of answers per second, a step each: all computed in every step, blocks alone over all or a quarter of what
    is around them, finished blocks kept."""
    prompt = context.sizes.steps[0][1] // 2
    gen_length = max(8, prompt // 4)
    block = gen_length // 4
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "all in every step": ({}, {"block_length": block}),
        "dual reuse": ({}, {"block_length": block, "kv_reuse": "dual"}),
        "a quarter retained": ({}, {"block_length": block, "sparse_config": SparseConfig(retention_ratio=0.25)}),
        f"a model that sees in blocks of {block}": ({"block_size": block}, {}),
    }
    peak = matrix_peak(torch.bfloat16)
    for number, (name, (fields, options)) in enumerate(ways.items()):
        checkpoint = _converted(context, f"canvas-{number}", fields)
        llm = make_engine(Context(context.sizes, checkpoint), max_num_seqs=max(BATCHES))
        params = SamplingParams(temperature=0, gen_length=gen_length, steps=gen_length, ignore_eos=True, **options)
        for batch in BATCHES:
            what = f"canvases of {gen_length} behind {prompt}, batch {batch}, {name}"
            prompts = [[(7 * place + i) % context.sizes.vocabulary for i in range(prompt)] for place in range(batch)]
            try:
                llm.generate(prompts, params, use_tqdm=False)  # compiles
                before, start = llm.stats(), time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                seconds, after = time.perf_counter() - start, llm.stats()
            except RuntimeError as error:  # out of memory among them
                yield untaken(what, "tokens/s", error)
                continue
            computed, num_steps = (
                after.num_computed_tokens - before.num_computed_tokens,
                after.num_steps - before.num_steps,
            )
            floor = weight_bytes(context) * computed / peak  # two operations per parameter of two bytes, and token
            details = {
                "steps": num_steps,
                "tokens_computed": computed,
                "milliseconds_per_step": round(1e3 * seconds / num_steps, 3),
                "percent_of_floor": round(100 * floor / seconds, 1),
            }
            yield Figure(what, round(batch * gen_length / seconds), "tokens/s", details=details)
        del llm
        gc.collect()


def _published(context: Context) -> Iterator[Figure]:
    """Answers to prompts of mixed lengths in bfloat16, beside the published sampler's padded batch."""
    sizes, draw = context.sizes, random.Random(0)
    lengths = [draw.randint(*sizes.lengths) for _ in range(min(16, sizes.requests))]
    prompts = [[draw.randrange(sizes.vocabulary) for _ in range(length)] for length in lengths]
    checkpoint = make_llada(context.checkpoint / "llada", sizes.shape)
    with LLM(checkpoint, device=DEVICE, max_num_batched_tokens=max(2048, sum(lengths) + 16 * 16)) as llm:
        ours = _seconds(partial(llm.generate, prompts, _params(), use_tqdm=False))
    gc.collect()
    what = "exact over the published sampler, padded"
    try:
        peer = Peer(checkpoint, torch.bfloat16, DEVICE)
        theirs = _seconds(partial(peer.generate, prompts, 16, 8, 8))
    except RuntimeError as error:  # out of memory among them: it keeps the logits of every row
        yield untaken(what, "times", error, 2)
        return
    details = {"seconds": round(ours, 3), "published_seconds": round(theirs, 3), "requests": len(prompts)}
    yield Figure(what, round(theirs / ours, 2), "times", 2, details=details)


def _equality(context: Context) -> Iterator[Figure]:
    """In float32 a small model writes what the published sampler writes; and everything retained is dual reuse."""
    torch.set_float32_matmul_precision("highest")  # TensorFloat-32 off
    draw = random.Random(1)
    prompts = [[draw.randrange(200) for _ in range(length)] for length in (3, 16, 40, 61)]
    checkpoint = make_llada(context.checkpoint / "small-llada", "tiny")
    peer = Peer(checkpoint, torch.float32, DEVICE)
    with LLM(checkpoint, device=DEVICE, dtype="float32") as llm:

        def tokens(**more: Any) -> list[int]:
            outputs = llm.generate(prompts, _params(**more), use_tqdm=False)
            return [token for output in outputs for token in output.token_ids]

        everything = SparseConfig(retention_ratio=1.0, delay_step=0)
        pairs = {
            "tokens as the published sampler's": (peer.generate(prompts, 16, 8, 8).flatten().tolist(), tokens()),
            "tokens, all retained, as dual reuse": (tokens(kv_reuse="dual"), tokens(sparse_config=everything)),
        }
    for what, (one, other) in pairs.items():
        same = sum(a == b for a, b in zip(one, other, strict=True))
        yield Figure(f"{what}, float32", round(100 * same / len(one), 1), "%", 99)


def _params(**more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, gen_length=16, steps=8, block_length=8, ignore_eos=True, **more)


def _seconds(run: Callable[[], object]) -> float:
    """Of the second time: the first one compiles."""
    run()
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _converted(context: Context, name: str, fields: dict[str, Any]) -> Path:
    """The random checkpoint as a diffusion model, whose mask is its last token."""
    to = context.checkpoint / name
    to.mkdir()
    for file in context.checkpoint.iterdir():
        if file.is_file() and file.name != "config.json":
            (to / file.name).symlink_to(file)
    config = json.loads((context.checkpoint / "config.json").read_text())
    names = {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"}
    (to / "config.json").write_text(
        json.dumps({**config, **names, "mask_token_id": config["vocab_size"] - 1, **fields})
    )
    return to
