"""OLMo 2: attention and feed-forward read the stream as it is; what they give is normalised before it is added.

Queries and keys are normalised over the whole projection rather than head by head. In bfloat16 transformers multiplies
by a norm's weight before it rounds, and Mini-Infer after, as in the other families.

OLMo Team, 2 OLMo 2 Furious, 2025, https://arxiv.org/abs/2501.00656
"""

from transformers import PretrainedConfig

from mini_infer.models.config import FeedForwardConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import attention, model_config

ARCHITECTURE = "Olmo2ForCausalLM"
MODEL_TYPE = "olmo2"
NAMES = {
    **llama.NAMES,
    "layers.*.attention.q_norm": ("model.layers.*.self_attn.q_norm",),
    "layers.*.attention.k_norm": ("model.layers.*.self_attn.k_norm",),
    "layers.*.attention_post_norm": ("model.layers.*.post_attention_layernorm",),
    "layers.*.feed_forward_post_norm": ("model.layers.*.post_feedforward_layernorm",),
}


def read(hf: PretrainedConfig) -> ModelConfig:
    layer = LayerConfig(
        attention(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, qk_norm="projection"),
        FeedForwardConfig(hf.intermediate_size),
        norms="post",
    )
    return model_config(hf, ARCHITECTURE, (layer,) * hf.num_hidden_layers)
