"""Qwen3: Qwen2 without its biases, but with a norm on every query and key head.

Qwen Team, Qwen3 Technical Report, 2025, https://arxiv.org/abs/2505.09388
"""

from transformers import PretrainedConfig

from mini_infer.models.config import AttentionConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import feed_forward, heads, model_config, rope, sliding_windows

ARCHITECTURE = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
NAMES = {
    **llama.NAMES,
    "layers.*.attention.q_norm": ("model.layers.*.self_attn.q_norm",),
    "layers.*.attention.k_norm": ("model.layers.*.self_attn.k_norm",),
}


def read(hf: PretrainedConfig) -> ModelConfig:
    def layer(window: int | None) -> LayerConfig:
        attention = AttentionConfig(
            **heads(hf),
            qkv_bias=hf.attention_bias,
            output_bias=hf.attention_bias,
            qk_norm="head",
            rope=rope(hf),
            sliding_window=window,
        )
        return LayerConfig(attention, feed_forward(hf), norms="pre")

    return model_config(hf, ARCHITECTURE, tuple(layer(window) for window in sliding_windows(hf)))
