"""LLaDA: Llama without its causal mask, trained to fill in what is masked, in the words of OLMo's code.

Nie et al., Large Language Diffusion Models, 2025, https://arxiv.org/abs/2502.09992
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models.config import DiffusionConfig, ModelConfig
from mini_infer.models.families import llama

ARCHITECTURE = "LLaDAModelLM"
MODEL_TYPE = "llada"

_LAYER = "model.transformer.blocks.*"

NAMES = {
    "embedding": ("model.transformer.wte",),
    "layers.*.attention_norm": (f"{_LAYER}.attn_norm",),
    "layers.*.attention.qkv_proj": (f"{_LAYER}.q_proj", f"{_LAYER}.k_proj", f"{_LAYER}.v_proj"),
    "layers.*.attention.o_proj": (f"{_LAYER}.attn_out",),
    "layers.*.feed_forward_norm": (f"{_LAYER}.ff_norm",),
    # The activation is applied to what OLMo's code calls ff_proj; that is the gate.
    "layers.*.feed_forward.gate_up_proj": (f"{_LAYER}.ff_proj", f"{_LAYER}.up_proj"),
    "layers.*.feed_forward.down_proj": (f"{_LAYER}.ff_out",),
    "norm": ("model.transformer.ln_f",),
    "output": ("model.transformer.ff_out",),
}

_ONLY: Mapping[str, object] = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "norm_after": False,
    "clip_qkv": None,
    "block_group_size": 1,
}
"""Fields that would change what the model computes, and the one value of each that is implemented."""

_WORDS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
}


def translate(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """As a Llama's config.

    Raises:
        UnsupportedModelError: a field has a value that is not implemented.
        InvalidCheckpointError: one is missing.
    """
    for name, value in _ONLY.items():
        if name in fields and fields[name] != value and (fields[name] or value):
            raise UnsupportedModelError(f"{name} must be {value!r}; got {str(fields[name])[:80]!r}")
    fields = dict(fields)
    if fields.get("mlp_hidden_size") is None:
        fields["mlp_hidden_size"] = fields.get("mlp_ratio", 4) * fields["d_model"]
    missing = [name for name in (*_WORDS, "mask_token_id") if fields.get(name) is None]
    if missing:
        raise InvalidCheckpointError(f"config.json lacks {', '.join(missing)}")
    kv_heads = 1 if fields.get("multi_query_attention") else fields.get("n_kv_heads") or fields["n_heads"]
    return "llama", {
        **{theirs: fields[ours] for ours, theirs in _WORDS.items()},
        "num_key_value_heads": kv_heads,
        "vocab_size": fields.get("embedding_size") or fields.get("vocab_size"),
        "tie_word_embeddings": fields.get("weight_tying", True),
        "mask_token_id": fields["mask_token_id"],
        **{name: fields[name] for name in ("torch_dtype", "dtype", "quantization_config") if name in fields},
    }


def read(hf: PretrainedConfig) -> ModelConfig:
    return replace(llama.read(hf), architecture=ARCHITECTURE, diffusion=DiffusionConfig(hf.mask_token_id))
