"""Qwen3 turned into a masked diffusion model: its weights and names, without the causal mask.

All tokens see each other, or, where config.json has a ``block_size``, those of a block and of the blocks before it. The
converter writes none, and a conversion in blocks (BD3LM) must be told apart from one without by whoever has it.

Arriola et al., Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models, 2025,
https://arxiv.org/abs/2503.09573
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from mini_infer.models.config import DiffusionConfig, ModelConfig
from mini_infer.models.families import qwen3

ARCHITECTURE = "A2DQwen3LMHeadModel"
MODEL_TYPE = "a2d-qwen3"
NAMES = qwen3.NAMES


def translate(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """As a Qwen3's config."""
    return "qwen3", fields


def read(hf: PretrainedConfig) -> ModelConfig:
    diffusion = DiffusionConfig(hf.mask_token_id, span=getattr(hf, "block_size", None))
    return replace(qwen3.read(hf), architecture=ARCHITECTURE, diffusion=diffusion)
