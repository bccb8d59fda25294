"""Llama 2 and 3, and whatever was built like them.

Llama Team, The Llama 3 Herd of Models, 2024, https://arxiv.org/abs/2407.21783
"""

from transformers import PretrainedConfig

from mini_infer.models.config import FeedForwardConfig, LayerConfig, ModelConfig
from mini_infer.models.hf_config import attention, model_config

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"

NAMES = {
    "embedding": ("model.embed_tokens",),
    "layers.*.attention_norm": ("model.layers.*.input_layernorm",),
    "layers.*.attention.qkv_proj": (
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "layers.*.attention.o_proj": ("model.layers.*.self_attn.o_proj",),
    "layers.*.feed_forward_norm": ("model.layers.*.post_attention_layernorm",),
    "layers.*.feed_forward.gate_up_proj": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    "layers.*.feed_forward.down_proj": ("model.layers.*.mlp.down_proj",),
    "norm": ("model.norm",),
    "output": ("lm_head",),
}


def read(hf: PretrainedConfig) -> ModelConfig:
    layer = LayerConfig(
        attention(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias),
        FeedForwardConfig(hf.intermediate_size, bias=hf.mlp_bias),
    )
    return model_config(hf, ARCHITECTURE, (layer,) * hf.num_hidden_layers)
