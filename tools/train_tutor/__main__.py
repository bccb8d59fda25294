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
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from .corpus import Corpus
from .diffusion import DiffusionModel, DiffusionRecipe, evaluate_diffusion, train_diffusion, with_mask
from .diffusion import model_config as diffusion_config
from .evaluate import evaluate, suites
from .export import (
    DIFFUSION_CARDS,
    export_cards,
    export_diffusion,
    export_heldout,
    export_mean,
    export_model,
    write_json,
)
from .glossary import LANGUAGES
from .questions import HELDOUT, TRAIN, heldout_questions
from .tokenizer import train_tokenizer
from .train import Recipe, model_config, train

ASSETS = Path(__file__).parents[2] / "mini_infer" / "assets"
TUTOR = ASSETS / "tutor"
TOKENIZER_DOCUMENTS = 20_000
CHECKPOINT_EVERY = 250
STATE = Path("diffusion_tutor.state.pt")
LOSS_SPAN = 50  # the loss reported is the mean over so many steps

console = Console()


def main(
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; its recipe's own by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the corpus.")] = Recipe.seed,
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = TUTOR,
    start: Annotated[Path | None, typer.Option(help="A tutor to go on from, with new terms or wordings.")] = None,
    peak_lr: Annotated[float | None, typer.Option(help="Highest learning rate; the recipe's own by default.")] = None,
    mean: Annotated[
        list[Path] | None, typer.Option(help="Do not train: the mean of these tutors, each gone on from the last.")
    ] = None,
    only_evaluate: Annotated[bool, typer.Option(help="Do not train: score the model in OUT again.")] = False,
    diffusion: Annotated[bool, typer.Option(help="Make the diffusion tutor, from the weights of the other.")] = False,
    state: Annotated[Path, typer.Option(help="Where training goes on from, of the diffusion tutor.")] = STATE,
    at_most: Annotated[int, typer.Option(help="Held-out questions of each kind, for the diffusion tutor.")] = 10_000,
) -> None:
    """Make the bundled tutor from nothing, and say how good it is."""
    corpus = Corpus.load()
    given = {"seed": seed, "steps": steps, "peak_lr": peak_lr}
    asked = {name: value for name, value in given.items() if value is not None}
    if diffusion:
        out = ASSETS / "diffusion_tutor" if out == TUTOR else out
        make_diffusion(corpus, DiffusionRecipe(**asked), out, state, only_evaluate, at_most)
        return
    report_file = out / "evaluation.json"
    if mean:
        export_mean(mean, out)
        report = json.loads((mean[-1] / "evaluation.json").read_text(encoding="utf-8"))
    elif only_evaluate:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    else:
        report = make(corpus, Recipe(**asked), start, out)
    console.print("Evaluating.")
    report["scores"] = evaluate(out, corpus.glossary)
    write_json(report_file, report)
    exam = [q for language in LANGUAGES for q in heldout_questions(corpus.glossary, language)]
    export_heldout(exam, out)
    export_cards(report, out)
    console.print_json(data=report)


def make(corpus: Corpus, recipe: Recipe, start: Path | None, out: Path) -> dict:
    """Train the tokenizer and the model, write checkpoints, and report how it went.

    Args:
        start: a tutor to go on from, whose tokenizer stays as it is.
    """
    started = time.monotonic()
    if start is None:
        sample = itertools.islice(corpus.documents(recipe.seed), TOKENIZER_DOCUMENTS)
        tokenizer = train_tokenizer("".join(s.text for s in document) for document in sample)
        earlier = []
    else:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
        before = json.loads((start / "evaluation.json").read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier", []), {name: before[name] for name in ("date", "recipe", "loss", "minutes")}]
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

        model = train(config, tokenizer, corpus.documents(recipe.seed), recipe, start, on_step)

    return {
        "date": date.today().isoformat(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "earlier": earlier,
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


def make_diffusion(
    corpus: Corpus, recipe: DiffusionRecipe, out: Path, state: Path, only_evaluate: bool, at_most: int
) -> None:
    """Train the diffusion tutor, or go on with it; write checkpoints, scores and cards."""
    started, losses = time.monotonic(), list[float]()
    tokenizer = with_mask(Tokenizer.from_file(str(TUTOR / "tokenizer.json")))
    config = diffusion_config(tokenizer)
    report_file = out / "evaluation.json"

    def mean_loss() -> float:
        return round(sum(losses[-LOSS_SPAN:]) / max(1, len(losses[-LOSS_SPAN:])), 4)

    def on_step(step: int, loss: float, average: DiffusionModel) -> None:
        losses.append(loss)
        if step % LOSS_SPAN == 0:
            console.print(f"step {step}: loss {mean_loss()}, {(time.monotonic() - started) / 60:.1f} minutes")
        if step % CHECKPOINT_EVERY == 0 or step == recipe.steps:
            export_diffusion(average, config, tokenizer, out)

    if only_evaluate:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    else:
        model = train_diffusion(config, tokenizer, corpus.documents, TUTOR, recipe, state, on_step, CHECKPOINT_EVERY)
        report = {
            "date": date.today().isoformat(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "recipe": asdict(recipe),
            "went_on_from": recipe.steps - len(losses),
            "loss": mean_loss(),
            "minutes": round((time.monotonic() - started) / 60),
        }
    console.print("Evaluating.")
    report["scores"] = {"float32": evaluate_diffusion(out, suites(corpus.glossary), at_most)}
    write_json(report_file, report)
    export_cards(report, out, DIFFUSION_CARDS)
    console.print_json(data=report)


typer.run(main)
