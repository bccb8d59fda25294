"""Dream: Qwen2.5 without the causal mask. As in the model it was made of, the logits after a token are for the next.

Ye et al., Dream 7B: Diffusion Large Language Models, 2025, https://arxiv.org/abs/2508.15487
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from mini_infer.models.config import DiffusionConfig, ModelConfig
from mini_infer.models.families import qwen2

ARCHITECTURE = "DreamModel"
MODEL_TYPE = "Dream"
NAMES = qwen2.NAMES


def translate(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """As a Qwen2's config."""
    return "qwen2", fields


def read(hf: PretrainedConfig) -> ModelConfig:
    diffusion = DiffusionConfig(hf.mask_token_id, shift=1)
    return replace(qwen2.read(hf), architecture=ARCHITECTURE, diffusion=diffusion)
