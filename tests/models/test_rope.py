"""Rotary tables against transformers' own, bit for bit."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mini_infer.models import hf_config
from mini_infer.models.rope import rotary_tables, yarn_attention_factor

from .checkpoints import ROPE_SCALINGS, random_config

SEVERAL_SCALINGS = {
    **ROPE_SCALINGS,
    "yarn-factor-1": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
    "yarn-narrow": {  # both ends of the ramp fall on the same pair
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 2.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "llama3-long": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaling", SEVERAL_SCALINGS)
def test_tables_equal_transformers(scaling: str, head_dim: int, theta: float) -> None:
    hf = random_config(
        "llama",
        0,
        rope_theta=theta,
        rope_scaling=SEVERAL_SCALINGS[scaling],
        head_dim=head_dim,
        max_position_embeddings=16384,
        architectures=["LlamaForCausalLM"],
    )
    cos, sin = rotary_tables(hf_config.rope(hf), head_dim, 16384)
    assert cos.dtype == sin.dtype == torch.float32
    expected_cos, expected_sin = LlamaRotaryEmbedding(hf)(torch.zeros(1), torch.arange(16384)[None])
    assert torch.equal(cos, expected_cos[0, :, : head_dim // 2])
    assert torch.equal(sin, expected_sin[0, :, : head_dim // 2])


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_attention_factor(40.0, mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert yarn_attention_factor(40.0, mscale=1.0) == yarn_attention_factor(40.0), "both weights or none"
