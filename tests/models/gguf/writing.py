"""Writes GGUF files with llama.cpp's own Python package, from checkpoints of transformers."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "olmo2": MODEL_ARCH.OLMO2,
}
PERMUTED = ("llama", "smollm3")
"""Families whose queries and keys llama.cpp rotates in neighbouring pairs."""

QUANTIZABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")
"""Types that the package can write."""


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of queries and keys."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    return (
        weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(path: Path, checkpoint: Path, seed: int, types: tuple[str, ...] = QUANTIZABLE, **keys: Any) -> None:
    """Write a checkpoint as GGUF, each matrix in a type drawn from ``types``, and change its own weights to what they
    are after that."""
    config = AutoConfig.from_pretrained(checkpoint)
    draw = random.Random(seed)
    writer = GGUFWriter(path, ARCHITECTURES[config.model_type].name.lower())
    add_config(writer, config)
    for key, value in keys.items():
        getattr(writer, key)(value)
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    weights = load_file(checkpoint / "model.safetensors")
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    after = {}
    for name, tensor in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        moves = heads is not None and config.model_type in PERMUTED
        numbers = tensor.float().numpy()
        if moves:
            numbers = permuted(numbers, heads)
        kind = GGMLQuantizationType[draw.choice(types) if numbers.ndim > 1 else "F32"]
        data = quantize(np.ascontiguousarray(numbers), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
        numbers = dequantize(data, kind).reshape(numbers.shape)
        after[name] = torch.from_numpy(np.ascontiguousarray(unpermuted(numbers, heads) if moves else numbers))
    save_file(after, checkpoint / "model.safetensors", {"format": "pt"})
    finish(writer)


def add_config(writer: GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
