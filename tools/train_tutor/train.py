"""The model and its training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from .corpus import END, END_OF_TEXT, Segment
from .optimizer import Optimizers, Schedule
from .tokenizer import MAX_LENGTH, VOCAB_SIZE

IGNORED = -100


@dataclass(frozen=True)
class Recipe(Schedule):
    steps: int = 2800
    short_row: int = 256
    long_row: int = MAX_LENGTH
    long_every: int = 8
    """Short rows are cheap; one step in so many uses long ones, so that every position is used."""

    def row(self, step: int) -> int:
        return self.long_row if step % self.long_every == self.long_every - 1 else self.short_row


def model_config(tokenizer: Tokenizer) -> dict:
    """The checkpoint's `config.json`, written so that old and new readers understand it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "torch_dtype": "bfloat16",
    }


def build_model(config: dict) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**{**config, "torch_dtype": "float32"}))


def encode(tokenizer: Tokenizer, document: list[Segment]) -> tuple[list[int], list[int]]:
    """Token ids, and the same as labels with everything ignored that is only to be read."""
    ids: list[int] = []
    labels: list[int] = []
    for segment, encoding in zip(document, tokenizer.encode_batch([segment.text for segment in document]), strict=True):
        ids += encoding.ids
        labels += encoding.ids if segment.learn else [IGNORED] * len(encoding.ids)
    return ids, labels


def pack_row(tokenizer: Tokenizer, documents: Iterator[list[Segment]], length: int) -> tuple[list[int], list[int]]:
    """Whole documents end to end, the last one cut off.

    A row begins with a fresh document, as a conversation does when the model is used.
    """
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < length:
        more_ids, more_labels = encode(tokenizer, next(documents))
        ids += more_ids
        labels += more_labels
    return ids[:length], labels[:length]


def train(
    config: dict,
    tokenizer: Tokenizer,
    documents: Iterator[list[Segment]],
    recipe: Recipe,
    start: Path | None,
    on_step: Callable[[int, float, Qwen3ForCausalLM], None],
) -> Qwen3ForCausalLM:
    """Train from nothing, or from the tutor in ``start``; `on_step` hears of each step, its loss and the model."""
    torch.manual_seed(recipe.seed)
    model = build_model(config) if start is None else Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.train()
    optimizers = Optimizers(model.model.layers, model.model.embed_tokens.weight, [model.model.norm.weight], recipe)
    for step in range(recipe.steps):
        length = recipe.row(step)
        rows = [pack_row(tokenizer, documents, length + 1) for _ in range(recipe.tokens_per_step // length)]
        ids = torch.tensor([row[0] for row in rows])
        labels = torch.tensor([row[1] for row in rows])
        loss = _loss(model, ids[:, :-1], labels[:, 1:])

        loss.backward()
        optimizers.step(step)
        on_step(step + 1, loss.item(), model)
    return model.eval()


def _loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the learnt tokens; only their rows go through the large output matrix."""
    learnt = labels != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[learnt])
    return F.cross_entropy(logits.float(), labels[learnt])
