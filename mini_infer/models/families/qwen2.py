"""Qwen2 and Qwen2.5: Llama, with biases for queries, keys and values, and windows in the upper layers if asked for.

Qwen Team, Qwen2 Technical Report, 2024, https://arxiv.org/abs/2407.10671
"""

from transformers import PretrainedConfig

from mini_infer.models.config import FeedForwardConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import attention, model_config, sliding_windows

ARCHITECTURE = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"
NAMES = llama.NAMES


def read(hf: PretrainedConfig) -> ModelConfig:
    feed_forward = FeedForwardConfig(hf.intermediate_size)
    layers = [
        LayerConfig(attention(hf, qkv_bias=True, sliding_window=window), feed_forward) for window in sliding_windows(hf)
    ]
    return model_config(hf, ARCHITECTURE, tuple(layers))
