"""Qwen2 and Qwen2.5: Llama, with biases for queries, keys and values, and windows in the upper layers if asked for.

Qwen Team, Qwen2 Technical Report, 2024, https://arxiv.org/abs/2407.10671
"""

from transformers import PretrainedConfig

from mini_infer.models.config import AttentionConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import feed_forward, heads, model_config, rope, sliding_windows

ARCHITECTURE = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"
NAMES = llama.NAMES


def read(hf: PretrainedConfig) -> ModelConfig:
    def layer(window: int | None) -> LayerConfig:
        attention = AttentionConfig(
            **heads(hf), qkv_bias=True, output_bias=False, qk_norm=None, rope=rope(hf), sliding_window=window
        )
        return LayerConfig(attention, feed_forward(hf), norms="pre")

    return model_config(hf, ARCHITECTURE, tuple(layer(window) for window in sliding_windows(hf)))
