"""Diffusion on random weights: what a canvas costs where all tokens see each other, and in blocks."""

import gc
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite.engine import make_engine, weight_bytes
from benchmarks.gpu_suite.figure import Context, Figure, untaken
from benchmarks.measure import matrix_peak
from mini_infer import SamplingParams

BATCHES = (1, 16)


def canvases(context: Context) -> Iterator[Figure]:
    """Tokens of answers per second, a step each: all computed in every step, blocks alone, finished blocks kept."""
    prompt = context.sizes.steps[0][1] // 2
    gen_length = max(8, prompt // 4)
    block = gen_length // 4
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "all in every step": ({}, {"block_length": block}),
        "dual reuse": ({}, {"block_length": block, "kv_reuse": "dual"}),
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


def _converted(context: Context, name: str, fields: dict[str, Any]) -> Path:
    """The random checkpoint as a diffusion model, whose mask is its last token."""
    to = context.checkpoint.with_name(name)
    shutil.copytree(context.checkpoint, to, copy_function=lambda source, target: Path(target).symlink_to(source))
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").unlink()
    names = {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"}
    (to / "config.json").write_text(
        json.dumps({**config, **names, "mask_token_id": config["vocab_size"] - 1, **fields})
    )
    return to
