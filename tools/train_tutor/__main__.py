"""`python -m tools.train_tutor`: corpus, tokenizer, training, export, evaluation, model card."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Qwen3ForCausalLM

from .corpus import Corpus
from .evaluate import evaluate
from .export import export_cards, export_heldout, export_model, write_json
from .glossary import LANGUAGES
from .questions import HELDOUT, TRAIN, heldout_questions
from .tokenizer import train_tokenizer
from .train import Recipe, model_config, train

TUTOR = Path(__file__).parents[2] / "mini_infer" / "assets" / "tutor"
TOKENIZER_DOCUMENTS = 20_000
CHECKPOINT_EVERY = 250
LOSS_SPAN = 50  # the loss reported is the mean over so many steps

console = Console()


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the corpus.")] = Recipe.seed,
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = TUTOR,
    only_evaluate: Annotated[bool, typer.Option(help="Do not train: score the model in OUT again.")] = False,
) -> None:
    """Make the bundled tutor from nothing, and say how good it is."""
    corpus = Corpus.load()
    report_file = out / "evaluation.json"
    if only_evaluate:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    else:
        report = make(corpus, Recipe(steps=steps, seed=seed), out)
    console.print("Evaluating.")
    report["scores"] = evaluate(out, corpus.glossary)
    write_json(report_file, report)
    exam = [q for language in LANGUAGES for q in heldout_questions(corpus.glossary, language)]
    export_heldout(exam, out)
    export_cards(report, out)
    console.print_json(data=report)


def make(corpus: Corpus, recipe: Recipe, out: Path) -> dict:
    """Train the tokenizer and the model, write checkpoints, and report how it went."""
    started = time.monotonic()
    sample = itertools.islice(corpus.documents(recipe.seed), TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer("".join(s.text for s in document) for document in sample)
    config = model_config(tokenizer)
    losses: list[float] = []
    recent = 0.0

    with Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        console=console,
    ) as progress:
        task = progress.add_task("Training", total=recipe.steps, loss=0.0)

        def on_step(step: int, loss: float, model: Qwen3ForCausalLM) -> None:
            nonlocal recent
            losses.append(loss)
            recent = sum(losses[-LOSS_SPAN:]) / len(losses[-LOSS_SPAN:])
            progress.update(task, completed=step, loss=recent)
            if step % CHECKPOINT_EVERY == 0 or step == recipe.steps:
                export_model(model, config, tokenizer, out)
                progress.console.print(f"step {step}: loss {recent:.4f}")

        model = train(config, tokenizer, corpus.documents(recipe.seed), recipe, on_step)

    return {
        "date": date.today().isoformat(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "loss": round(recent, 4),
        "minutes": round((time.monotonic() - started) / 60),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "terms": len(corpus.glossary.terms),
        "comparisons": len(corpus.glossary.comparisons),
        **{f"train_templates_{language}": len(TRAIN[language]) for language in LANGUAGES},
        **{f"heldout_templates_{language}": len(HELDOUT[language]) for language in LANGUAGES},
    }


typer.run(main)
