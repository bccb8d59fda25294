"""Mistral: Llama, with a sliding window in every layer of the first version.

Jiang et al., Mistral 7B, 2023, https://arxiv.org/abs/2310.06825
"""

from transformers import PretrainedConfig

from mini_infer.models.config import AttentionConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import feed_forward, heads, model_config, rope

ARCHITECTURE = "MistralForCausalLM"
MODEL_TYPE = "mistral"
NAMES = llama.NAMES


def read(hf: PretrainedConfig) -> ModelConfig:
    attention = AttentionConfig(
        **heads(hf),
        qkv_bias=False,
        output_bias=False,
        qk_norm=None,
        rope=rope(hf),
        sliding_window=hf.sliding_window,
    )
    layer = LayerConfig(attention, feed_forward(hf), norms="pre")
    return model_config(hf, ARCHITECTURE, (layer,) * hf.num_hidden_layers)
