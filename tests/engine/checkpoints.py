"""Tiny random checkpoints that an engine can load: a model and a tokenizer for every byte."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.checkpoints import make_checkpoint

EOS = 256
VOCAB_SIZE = 262

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def save_tokenizer(path: Path, **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte, so that any text is a prompt and any character but ASCII spans several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|eos|>",
        additional_special_tokens=["<|start|>", "<|end|>"],
        chat_template=CHAT_TEMPLATE,
        **options,
    )
    assert fast.eos_token_id == EOS
    fast.save_pretrained(path)
    return fast


def make_engine_checkpoint(
    path: Path, family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """A random model of ``family`` with the byte tokenizer beside it."""
    make_checkpoint(path, family, seed, dtype, **{"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, **overrides})
    save_tokenizer(path)
    return path
