"""SmolLM3: Llama, where every fourth layer does not rotate queries and keys.

Such a layer knows no positions but those that the others have put into the residual stream. It generalises to longer
texts, as there is no angle that it has never seen.

Bakouch et al., SmolLM3: smol, multilingual, long-context reasoner, 2025, https://huggingface.co/blog/smollm3
Yang et al., RoPE to NoPE and Back Again, 2025, https://arxiv.org/abs/2501.18795
"""

from dataclasses import replace

from transformers import PretrainedConfig

from mini_infer.exceptions import InvalidCheckpointError
from mini_infer.models.config import FeedForwardConfig, LayerConfig, ModelConfig
from mini_infer.models.families import llama
from mini_infer.models.hf_config import attention, model_config, sliding_windows

ARCHITECTURE = "SmolLM3ForCausalLM"
MODEL_TYPE = "smollm3"
NAMES = llama.NAMES


def read(hf: PretrainedConfig) -> ModelConfig:
    if len(hf.no_rope_layers) < hf.num_hidden_layers:
        raise InvalidCheckpointError(
            f"{hf.num_hidden_layers} layers need as many no_rope_layers; got {len(hf.no_rope_layers)}"
        )
    biases = {"qkv_bias": hf.attention_bias, "output_bias": hf.attention_bias}
    feed_forward = FeedForwardConfig(hf.intermediate_size, bias=hf.mlp_bias)

    def layer(rotated: int, window: int | None) -> LayerConfig:
        slot = attention(hf, **biases, sliding_window=window)
        return LayerConfig(slot if rotated else replace(slot, rope=None), feed_forward)

    # 1 in "no_rope_layers" is a layer with RoPE.
    return model_config(hf, ARCHITECTURE, tuple(map(layer, hf.no_rope_layers, sliding_windows(hf))))
