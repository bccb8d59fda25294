"""Qwen3 turned into a masked diffusion model: its weights and names, without the causal mask.

Only those in which all tokens see each other. The same conversion in blocks has a config that does not differ.
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
    diffusion = DiffusionConfig(hf.mask_token_id)
    return replace(qwen3.read(hf), architecture=ARCHITECTURE, diffusion=diffusion)
