"""Real checkpoints of tiny models with random weights, made on the spot; other test suites use them too."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2")

VARIED_FAMILIES = ("mistral", "qwen3", "smollm3", "olmo2")
"""Those whose layers differ in more than biases: enough for what an engine does around a model."""

ROPE_SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}


def random_config(family: str, seed: int, **overrides: Any) -> PretrainedConfig:
    """A config of `family` with every option drawn from `seed`; `overrides` are config.json's own names.

    RoPE is overridden as in transformers 4, by ``rope_theta`` and ``rope_scaling``.
    """
    draw = random.Random(f"{family} {seed}")
    num_kv_heads = draw.choice((1, 2, 3))
    num_heads = num_kv_heads * draw.choice((1, 2, 3, 4))
    num_layers = draw.choice((1, 2, 3))
    window = draw.choice((None, 3, 8))
    fields: dict[str, Any] = {
        "vocab_size": draw.choice((97, 128, 151)),
        "hidden_size": num_heads * draw.choice((6, 8, 10, 16)),  # a multiple of num_heads only for Llama's config
        "intermediate_size": draw.choice((24, 40, 57)),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": draw.choice((8, 12, 16, 20)),
        "max_position_embeddings": 256,
        "rms_norm_eps": draw.choice((1e-6, 1e-5)),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_theta": draw.choice((1e3, 1e4, 1e6)),
        "rope_scaling": draw.choice(list(ROPE_SCALINGS.values())),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if family in ("llama", "qwen3", "smollm3", "olmo2"):
        fields["attention_bias"] = draw.random() < 0.5
    if family in ("llama", "smollm3"):
        fields["mlp_bias"] = draw.random() < 0.5
    if family == "smollm3":
        fields["no_rope_layer_interval"] = draw.choice((1, 2, 4))
        fields["use_sliding_window"] = window is not None
        fields["sliding_window"] = window
    if family == "mistral":
        fields["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = window is not None
        fields["sliding_window"] = window
        fields["max_window_layers"] = draw.randrange(num_layers + 1)
    fields |= overrides
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = dict(fields["rope_scaling"])  # transformers adds to the dictionary that it is given
    return CONFIG_MAPPING[family](**fields)


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A transformers model with random weights.

    Weights are large enough that the logits spread over several units and each attention head looks at few tokens;
    norm weights and biases are random too, so that mixing two of them up shows.
    """
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif "embed_tokens" not in name or config.tie_word_embeddings:
                noise = 2 * noise / parameter.shape[-1] ** 0.5
            parameter.copy_(noise)
    return model


def make_checkpoint(path: Path, family: str, seed: int, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save a random model of `family` to `path`, as transformers does, and return `path`.

    The options are `random_config`'s; ``max_shard_size`` among the overrides goes to `save_pretrained` instead.
    """
    shard_size = overrides.pop("max_shard_size", "1GB")
    model = random_model(random_config(family, seed, **overrides), seed)
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    return path
