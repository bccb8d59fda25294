"""What ends up in `mini_infer/assets/tutor/`: a checkpoint, its scores and its model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from .corpus import END, END_OF_TEXT
from .diffusion import BLOCK_LENGTH, MASK, DiffusionModel
from .questions import HeldOut
from .tokenizer import save_tokenizer

CARDS = {"MODEL_CARD.md": "card.en.md", "MODEL_CARD.zh.md": "card.zh.md"}
DIFFUSION_CARDS = {"MODEL_CARD.md": "card.diffusion.en.md", "MODEL_CARD.zh.md": "card.diffusion.zh.md"}


def export_model(model: Qwen3ForCausalLM, config: dict, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint in bfloat16; the tied output matrix is not stored twice."""
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    _export(weights, config, tokenizer, directory, {})


def export_mean(tutors: Sequence[Path], directory: Path) -> None:
    """Write the mean of some tutors' weights, in everything else the last of them. Each must have gone on from the one
    before, so that they lie in one valley.

    Wortsman et al., Model soups, 2022, https://arxiv.org/abs/2203.05482
    """
    weights = [load_file(tutor / "model.safetensors") for tutor in tutors]
    mean = {name: torch.stack([each[name].float() for each in weights]).mean(0) for name in weights[0]}
    config = json.loads((tutors[-1] / "config.json").read_text(encoding="utf-8"))
    _export(mean, config, Tokenizer.from_file(str(tutors[-1] / "tokenizer.json")), directory, {})


def export_diffusion(model: DiffusionModel, config: dict, tokenizer: Tokenizer, directory: Path) -> None:
    """The same in LLaDA's names, with a tokenizer that knows the mask."""
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    _export(weights, config, tokenizer, directory, {"block_length": BLOCK_LENGTH}, mask_token=MASK)


def _export(
    weights: dict[str, torch.Tensor],
    config: dict,
    tokenizer: Tokenizer,
    directory: Path,
    generation: dict,
    **tokens: str,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    (directory / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    write_json(directory / "config.json", config)
    write_json(
        directory / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)],
            "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
            **generation,
        },
    )
    save_tokenizer(tokenizer, directory, **tokens)


def export_heldout(questions: list[HeldOut], directory: Path) -> None:
    """One question per line, so that the file reads and compares well."""
    lines = ",\n".join(json.dumps(asdict(q), ensure_ascii=False) for q in questions)
    (directory / "heldout.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def export_cards(report: dict, directory: Path, cards: dict[str, str] = CARDS) -> None:
    """Fill the figures of the evaluation into the model card, in both languages."""
    figures = {name: value for name, value in report.items() if not isinstance(value, dict)}
    figures |= report["recipe"]
    runs = [*report.get("earlier", []), report]
    figures |= {"all_minutes": sum(run["minutes"] for run in runs), "num_runs": len(runs)}
    for language, template in {"en": "{} steps from a peak of {}", "zh": "{} 步，峰值 {}"}.items():
        rates = [template.format(run["recipe"]["steps"], run["recipe"]["peak_lr"]) for run in runs]
        figures[f"runs_{language}"] = {"en": "; ", "zh": "；"}[language].join(rates)
    for dtype, suites in report["scores"].items():
        for suite, score in suites.items():
            percent = 100 * score["correct"] / score["total"]
            figures[f"{suite}_{dtype}"] = f"{percent:.1f} % ({score['correct']}/{score['total']})"
    for card, template in cards.items():
        text = Path(__file__).with_name(template).read_text(encoding="utf-8")
        (directory / card).write_text(Template(text).substitute(figures), encoding="utf-8")


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
