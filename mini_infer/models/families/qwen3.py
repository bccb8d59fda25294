"""Qwen3: Qwen2 without its biases, but with a norm on every query and key head.

Qwen Team, Qwen3 Technical Report, 2025, https://arxiv.org/abs/2505.09388
"""

from transformers import PretrainedConfig

from mini_infer.models.config import FeedForwardConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import attention, model_config, sliding_windows

ARCHITECTURE = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
NAMES = {
    **llama.NAMES,
    "layers.*.attention.q_norm": ("model.layers.*.self_attn.q_norm",),
    "layers.*.attention.k_norm": ("model.layers.*.self_attn.k_norm",),
}


def read(hf: PretrainedConfig) -> ModelConfig:
    biases = {"qkv_bias": hf.attention_bias, "output_bias": hf.attention_bias}
    feed_forward = FeedForwardConfig(hf.intermediate_size)
    layers = [
        LayerConfig(attention(hf, **biases, qk_norm="head", sliding_window=window), feed_forward)
        for window in sliding_windows(hf)
    ]
    return model_config(hf, ARCHITECTURE, tuple(layers))
