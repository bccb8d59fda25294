"""Mistral: Llama, with a sliding window in every layer of the first version.

Jiang et al., Mistral 7B, 2023, https://arxiv.org/abs/2310.06825
"""

from transformers import PretrainedConfig

from mini_infer.models.config import FeedForwardConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import attention, model_config

ARCHITECTURE = "MistralForCausalLM"
MODEL_TYPE = "mistral"
NAMES = llama.NAMES


def read(hf: PretrainedConfig) -> ModelConfig:
    layer = LayerConfig(attention(hf, sliding_window=hf.sliding_window), FeedForwardConfig(hf.intermediate_size))
    return model_config(hf, ARCHITECTURE, (layer,) * hf.num_hidden_layers)
