"""What structured outputs cost and save: ``python -m benchmarks.structured``.

A model of random weights, with a vocabulary as large as Qwen3's, made of pseudo-words: what a mask costs depends on how
many tokens there are and how they begin alike, not on what they mean.
"""

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.report import save
from benchmarks.shapes import SHAPES, make_random_checkpoint
from mini_infer import LLM, SamplingParams, StructuredOutputsParams

BATCH = 16
OUTPUT_TOKENS = 16

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 12},
        "temperature_celsius": {"type": "integer", "minimum": -40, "maximum": 50},
        "condition": {"enum": ["sunny", "cloudy", "raining", "snowing"]},
        "humidity_percent": {"type": "integer", "minimum": 0, "maximum": 100},
        "wind": {
            "type": "object",
            "properties": {
                "speed_kmh": {"type": "integer", "minimum": 0, "maximum": 200},
                "direction": {"enum": ["north", "east", "south", "west"]},
            },
            "required": ["speed_kmh", "direction"],
        },
    },
    "required": ["place", "temperature_celsius", "condition", "humidity_percent", "wind"],
}

console = Console()


def pseudo_words(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens grew letter by letter, the shorter the likelier."""
    draw = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "eeeeeeeeeeeetttttttttaaaaaaaaooooooooiiiiiiinnnnnnnsssssshhhhhhrrrrrrddddllllcccuuummmwwffggyyppbbvk"
    tokens = dict.fromkeys([*alphabet, "Ġ"])
    merges, grown = [], ["Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    while len(tokens) < vocab_size - 1:
        stem, letter = grown[int(len(grown) * draw.random() ** 2)], draw.choice(letters)
        if stem + letter not in tokens:
            tokens[stem + letter] = None
            merges.append((stem, letter))
            grown.append(stem + letter)
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def params(
    structured: StructuredOutputsParams | None = None, max_tokens: int = OUTPUT_TOKENS, temperature: float = 0
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=0, ignore_eos=True, structured_outputs=structured
    )


def step_seconds(llm: LLM, one: SamplingParams, batch: int) -> float:
    """Seconds of a decode step of a batch."""
    outputs = llm.generate([[1, 2, 3 + i] for i in range(batch)], one, use_tqdm=False)
    begun = max(output.metrics.first_token_time or 0.0 for output in outputs)
    ended = max(output.metrics.finished_time for output in outputs)
    return (ended - begun) / (max(len(output.token_ids) for output in outputs) - 1)


def in_turns(rounds: int, *measured: Callable[[], float]) -> list[float]:
    """Medians of what several functions report, called in turns; then the medians of the ratios to the first."""
    for one in measured:
        one()
    rows = [[one() for one in measured] for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return medians + [statistics.median(row[i] / row[0] for row in rows) for i in range(1, len(measured))]


def masks(llm: LLM, rounds: int, temperature: float) -> dict[str, Any]:
    """A decode step of free text, and one whose every token is masked and none forced."""
    text = StructuredOutputsParams(regex=r'[^"\\\x00-\x1f]{1000,}')  # what a JSON string holds, and no end of it
    free, masked, ratio = in_turns(
        rounds,
        lambda: step_seconds(llm, params(temperature=temperature), BATCH),
        lambda: step_seconds(llm, params(text, temperature=temperature), BATCH),
    )
    return {
        "requests": BATCH,
        "temperature": temperature,
        "free_step_ms": round(1e3 * free, 2),
        "masked_step_ms": round(1e3 * masked, 2),
        "ratio": round(ratio, 3),
    }


def new_schemas(llm: LLM, rounds: int) -> dict[str, Any]:
    """Seconds to the first token, with no schema and with one that was never seen before."""
    numbers = itertools.count()

    def first_token(structured: StructuredOutputsParams | None) -> float:
        start = time.monotonic()
        (output,) = llm.generate([[1, 2, 3]], params(structured, 1), use_tqdm=False)
        assert output.metrics.first_token_time is not None
        return output.metrics.first_token_time - start

    def unseen() -> StructuredOutputsParams:
        return StructuredOutputsParams(json={**WEATHER, "title": f"weather {next(numbers)}"})

    free, new, _ = in_turns(2 * rounds, lambda: first_token(None), lambda: first_token(unseen()))
    return {
        "free_ms": round(1e3 * free, 2),
        "new_schema_ms": round(1e3 * new, 2),
        "delay_ms": round(1e3 * (new - free), 2),
    }


def forced(llm: LLM, rounds: int, batch: int) -> dict[str, Any]:
    """Answers that keep to a schema, and free text of as many tokens."""
    schema = StructuredOutputsParams(json=WEATHER)
    prompts = [[1, 2, 3 + i] for i in range(batch)]
    lengths = [len(o.token_ids) for o in llm.generate(prompts, params(schema, 300), use_tqdm=False)]
    steps = llm.stats().num_steps
    llm.generate(prompts, params(schema, 300), use_tqdm=False)
    steps = llm.stats().num_steps - steps

    def seconds(of: list[SamplingParams]) -> float:
        start = time.perf_counter()
        llm.generate(prompts, of, use_tqdm=False)
        return time.perf_counter() - start

    with_schema = [params(schema, 300)] * batch
    free_text = [params(None, length) for length in lengths]
    json_seconds, free_seconds, ratio = in_turns(rounds, lambda: seconds(with_schema), lambda: seconds(free_text))
    return {
        "requests": batch,
        "tokens": sum(lengths),
        "steps": steps,
        "free_steps": max(lengths),
        "json_seconds": round(json_seconds, 3),
        "free_seconds": round(free_seconds, 3),
        "speedup": round(ratio, 2),
    }


def main(
    shape: Annotated[str, typer.Option(help="The model's shape.")] = "qwen3-0.6b",
    rounds: Annotated[int, typer.Option(help="How often each pair is measured.")] = 7,
    write: Annotated[bool, typer.Option(help="Write benchmarks/results/structured-cpu.json.")] = True,
) -> None:
    """Measure on this machine and write benchmarks/results/structured-cpu.json."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_random_checkpoint(Path(folder) / shape, shape)
        pseudo_words(SHAPES[shape]["vocab_size"]).save_pretrained(path)
        with LLM(path, max_model_len=512, num_gpu_blocks=32 * BATCH) as llm:
            start = time.perf_counter()
            llm.make_request([1], params(StructuredOutputsParams(choice=["x"])))
            figures: dict[str, Any] = {
                "shape": shape,
                "dtype": "bfloat16",
                "rounds": rounds,
                "threads": torch.get_num_threads(),
                "vocabulary_seconds": round(time.perf_counter() - start, 2),
            }
            for name, measured in (
                ("masks", lambda: [masks(llm, rounds, temperature) for temperature in (0, 1)]),
                ("new_schemas", lambda: new_schemas(llm, rounds)),
                ("forced", lambda: [forced(llm, rounds, batch) for batch in (1, BATCH)]),
            ):
                figures[name] = measured()
                console.print(name, json.dumps(figures[name]))
    if write:
        console.print(f"written to {save('structured-cpu', 'python -m benchmarks.structured', figures)}")


if __name__ == "__main__":
    typer.run(main)
