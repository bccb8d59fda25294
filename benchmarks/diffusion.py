"""Diffusion models beside the sampler that LLaDA publishes: ``python -m benchmarks.diffusion``.

The peer is that sampler as people run it: a padded batch in plain PyTorch, all of it computed in every step, with the
logits of every row. Its model is transformers' Llama without the causal mask. Rounds alternate, and medians of ratios
are reported. On a random model of a named shape, where nothing is ever likely and both do the same steps; and on the
bundled diffusion tutor, where answers are known: what each faster way costs in answers, what it saves in passes and
memory. There ours end where the text is final, with the same text, while the sampler always writes all masks. On two
cores about four minutes.
"""

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import save
from benchmarks.shapes import SHAPES, make_random_checkpoint
from mini_infer import LLM, SamplingParams, SparseConfig
from mini_infer.engine.loop import StepObserver
from mini_infer.models.families import llada
from mini_infer.models.families.llama import NAMES as LLAMA_NAMES
from mini_infer.scheduler import SchedulerOutputs

TUTOR = Path(llada.__file__).parents[2] / "assets" / "diffusion_tutor"
Prompts = Sequence[list[int]]


def make_llada(directory: Path, shape: str) -> Path:
    """A random checkpoint of a named shape, with LLaDA's config and names, and a tokenizer for every byte."""
    make_random_checkpoint(directory, shape)
    theirs = json.loads((directory / "config.json").read_text())
    names = dict(zip(_tensors(LLAMA_NAMES), _tensors(llada.NAMES), strict=True))
    weights, size = {}, theirs["num_attention_heads"] * theirs["head_dim"]
    for name, weight in load_file(directory / "model.safetensors").items():
        pattern, number = _pattern(name)
        if pattern in names:
            weights[names[pattern].replace("*", number) + ".weight"] = weight
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": theirs["hidden_size"],
        "n_layers": theirs["num_hidden_layers"],
        "n_heads": theirs["hidden_size"] // theirs["head_dim"],
        "n_kv_heads": theirs["num_key_value_heads"],
        "mlp_hidden_size": theirs["intermediate_size"],
        "max_sequence_length": 1024,
        "vocab_size": theirs["vocab_size"],
        "mask_token_id": theirs["vocab_size"] - 1,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "weight_tying": True,
        "torch_dtype": "bfloat16",
    }
    if size != theirs["hidden_size"]:  # LLaDA's heads are as wide as the stream together
        for name in weights:
            if "q_proj" in name:
                weights[name] = weights[name][: theirs["hidden_size"]].contiguous()
            elif "attn_out" in name:
                weights[name] = weights[name][:, : theirs["hidden_size"]].contiguous()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _tensors(names: dict[str, tuple[str, ...]]) -> list[str]:
    return [tensor for path in sorted(LLAMA_NAMES) for tensor in names[path]]


def _pattern(name: str) -> tuple[str, str]:
    parts = name.removesuffix(".weight").split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return ".".join("*" if part.isdigit() else part for part in parts), number


class Peer:
    """LLaDA's published loop over a padded batch.

    Args:
        directory: a checkpoint in LLaDA's format.
        dtype: what to compute in.
        device: where.
    """

    def __init__(self, directory: Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        fields = json.loads((directory / "config.json").read_text())
        _, translated = llada.translate(fields)
        self.mask = translated.pop("mask_token_id")
        translated.pop("torch_dtype", None)
        config = LlamaConfig(**translated, attn_implementation="sdpa", pad_token_id=0, eos_token_id=0, bos_token_id=0)
        self.model = LlamaForCausalLM(config).to(dtype).eval()
        names = dict(zip(_tensors(llada.NAMES), _tensors(LLAMA_NAMES), strict=True))
        weights = {}
        for name, weight in load_file(directory / "model.safetensors").items():
            pattern, number = _pattern(name)
            weights[names[pattern].replace("*", number) + ".weight"] = weight
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
        self.model.tie_weights()
        self.model.to(device)
        self.device = device

    @torch.inference_mode()
    def generate(self, prompts: Prompts, gen_length: int, steps: int, block_length: int) -> Tensor:
        """Greedy, with low-confidence remasking; the answers, ``[B, gen_length]``."""
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + p + [self.mask] * gen_length for p in prompts]
        filled = [[False] * (longest - len(p)) + [True] * (len(p) + gen_length) for p in prompts]
        ids, real = (torch.tensor(rows, device=self.device) for rows in (padded, filled))
        alone = torch.eye(ids.shape[1], dtype=torch.bool, device=self.device)
        seen = (real[:, None, None, :] & real[:, None, :, None]) | alone
        num_blocks = gen_length // block_length
        for block in range(num_blocks):
            end = longest + (block + 1) * block_length
            per_step = block_length * num_blocks // steps
            for _ in range(steps // num_blocks):
                logits = self.model(input_ids=ids, attention_mask=seen, use_cache=False).logits
                tokens = logits.argmax(dim=-1)
                confidence = logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
                confidence = confidence.masked_fill(ids != self.mask, -math.inf)
                confidence[:, end:] = -math.inf
                chosen = confidence.topk(per_step, dim=-1).indices
                ids.scatter_(1, chosen, tokens.gather(1, chosen))
        return ids[:, longest:]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    peer: Peer,
    llm: LLM,
    prompts: Prompts,
    gen_length: int,
    steps: int,
    block_length: int,
    rounds: int,
    *,
    ends: bool = False,
    **faster: Any,
) -> dict[str, Any]:
    """Seconds of both, and of what is faster, in alternating rounds; ``ends``: ours do not go on behind the text."""
    exact = SamplingParams(
        temperature=0, gen_length=gen_length, steps=steps, block_length=block_length, ignore_eos=not ends
    )
    quick = replace(exact, **({"steps": None, **faster} if "threshold" in faster else faster))
    runs: dict[str, Callable[[], object]] = {
        "published": lambda: peer.generate(prompts, gen_length, steps, block_length),
        "exact": lambda: llm.generate(list(prompts), exact, use_tqdm=False),
    }
    if faster:
        runs["faster"] = lambda: llm.generate(list(prompts), quick, use_tqdm=False)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    figures: dict[str, Any] = {
        "requests": len(prompts),
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "gen_length": gen_length,
        "steps": steps,
        "block_length": block_length,
        "ends": ends,
        "options": faster,
        **{f"{name}_seconds": round(statistics.median(taken), 3) for name, taken in times.items()},
    }
    for name in list(runs)[1:]:
        ratios = [a / b for a, b in zip(times["published"], times[name], strict=True)]
        figures[f"{name}_over_published"] = round(statistics.median(ratios), 2)
    return figures


def random_model(shape: str, rounds: int) -> dict[str, Any]:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_llada(Path(directory), shape)
        peer, llm = Peer(checkpoint), LLM(checkpoint, max_num_batched_tokens=8192, max_num_seqs=16)

        def prompts(lengths: Sequence[int]) -> Prompts:
            return [[draw.randrange(250) for _ in range(length)] for length in lengths]

        return {
            "1 request": compare(peer, llm, prompts([96]), 32, 8, 32, rounds),
            "16 requests": compare(peer, llm, prompts([32 + 15 * i for i in range(16)]), 32, 1, 32, rounds),
            "1 request, prefix reuse": compare(peer, llm, prompts([224]), 16, 16, 8, rounds, kv_reuse="prefix"),
        }


class Watch(StepObserver):
    """Counts what an engine computes.

    Attributes:
        num_passes: of one sequence each.
        num_tokens: that were computed in them.
        most_blocks: that one sequence held.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin to count anew."""
        self.num_passes = self.num_tokens = self.most_blocks = 0

    def planned(self, plan: SchedulerOutputs, began: int) -> None:
        self.num_passes += len(plan.scheduled)
        self.num_tokens += plan.num_tokens
        self.most_blocks = max([self.most_blocks, *(len(item.sequence.block_table) for item in plan.scheduled)])


WAYS: dict[str, dict[str, Any]] = {
    "exact": {"steps": 64},
    "threshold": {"threshold": 0.9},
    "prefix": {"steps": 64, "kv_reuse": "prefix"},
    "prefix and threshold": {"kv_reuse": "prefix", "threshold": 0.9},
    "dual": {"steps": 64, "kv_reuse": "dual"},
    "sparse 0.75": {"steps": 64, "sparse_config": SparseConfig(retention_ratio=0.75)},
    "sparse 0.5": {"steps": 64, "sparse_config": SparseConfig(retention_ratio=0.5)},
    "sparse 0.25": {"steps": 64, "sparse_config": SparseConfig(retention_ratio=0.25)},
}
"""How the tutor's answers are written, of 64 masks in blocks of 16."""


def tutor(path: Path, rounds: int, num_questions: int) -> dict[str, Any]:
    """Speed; and what the faster ways cost: agreement with the exact answers, passes for each token, time and memory.

    Answers end where their first end-of-sequence token is, and agreement of tokens is counted place by place up to the
    end of the longer one.
    """
    peer, llm = Peer(path), LLM(path, max_num_batched_tokens=8192)
    exam = json.loads((path.parent / "tutor" / "heldout.json").read_text(encoding="utf-8"))
    chosen = exam[:: max(1, len(exam) // num_questions)][:num_questions]
    conversations = [[{"role": "user", "content": one["question"]}] for one in chosen]
    prompts = [llm.tokenize(llm.render_chat(messages)) for messages in conversations]
    figures: dict[str, Any] = {
        "1 request": compare(peer, llm, prompts[:1], 64, 64, 16, rounds, ends=True, **WAYS["prefix and threshold"]),
        "16 requests": compare(peer, llm, prompts[:16], 64, 64, 16, rounds, ends=True, **WAYS["prefix and threshold"]),
    }
    exact: list[list[int]] = []
    watch = Watch()
    llm.watch(watch)
    block_bytes = sum(spec.bytes_per_token for spec in llm.model_config.cache_specs(torch.bfloat16))
    block_bytes *= llm.config.block_size
    for name, options in WAYS.items():
        params = SamplingParams(temperature=0, gen_length=64, block_length=16, **options)
        watch.clear()
        start = time.perf_counter()
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
        taken = time.perf_counter() - start
        answers = [output.token_ids for output in outputs]
        exact = exact or answers
        pairs = [pair for both in zip(answers, exact, strict=True) for pair in zip_longest(*both)]
        figures[name] = {
            "questions": len(chosen),
            "right": sum(output.text == one["answer"] for output, one in zip(outputs, chosen, strict=True)),
            "same_as_exact": sum(one == other for one, other in zip(answers, exact, strict=True)),
            "same_tokens": round(sum(one == other for one, other in pairs) / len(pairs), 3),
            "tokens_per_pass": round(sum(map(len, answers)) / watch.num_passes, 2),
            "computed_for_each": round(watch.num_tokens / sum(map(len, answers)), 1),
            "kv_kib": round(watch.most_blocks * block_bytes / 1024),
            "seconds": round(taken, 2),
        }
    return figures


def main(
    shape: Annotated[str, typer.Option(help=f"Shape of the random model: {', '.join(SHAPES)}.")] = "qwen3-0.6b",
    rounds: Annotated[int, typer.Option(help="Alternating rounds; medians are reported.")] = 2,
    questions: Annotated[int, typer.Option(help="Held-out questions for the tutor.")] = 32,
    name: Annotated[str, typer.Option(help="Name of the results file.")] = "diffusion-cpu",
) -> None:
    figures: dict[str, Any] = {"shape": shape, "rounds": rounds, "random": random_model(shape, rounds)}
    console = Console()
    figures["tutor"] = None
    if (TUTOR / "config.json").exists():
        figures["tutor"] = tutor(TUTOR, rounds, questions)
    else:
        console.print(f"there is no {TUTOR}, so that its figures are left out", soft_wrap=True)
    table = Table("model", "case", "published", "exact", "faster", title="seconds, and times as fast")
    for model in ("random", "tutor"):
        for case, one in (figures[model] or {}).items():
            if "published_seconds" in one:
                cells = [f"{one['published_seconds']}"]
                for way in ("exact", "faster"):
                    has = f"{way}_seconds" in one
                    cells.append(f"{one[f'{way}_seconds']} ({one[f'{way}_over_published']}x)" if has else "")
                table.add_row(model, case, *cells)
            else:
                table.add_row(model, case, json.dumps(one))
    console.print(table)
    console.print(f"written to {save(name, 'python -m benchmarks.diffusion', figures)}")


if __name__ == "__main__":
    typer.run(main)
