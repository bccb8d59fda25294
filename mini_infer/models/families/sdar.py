"""SDAR: Qwen3 that sees in blocks: the tokens of its own, on both sides, and all blocks before.

Cheng et al., SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable Sequence Generation, 2025,
https://arxiv.org/abs/2510.06303
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from mini_infer.exceptions import InvalidCheckpointError
from mini_infer.models.config import DiffusionConfig, ModelConfig
from mini_infer.models.families import qwen3

ARCHITECTURE = "SDARForCausalLM"
MODEL_TYPE = "sdar"
NAMES = qwen3.NAMES


def translate(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """As a Qwen3's config.

    Raises:
        InvalidCheckpointError: it does not say how long a block is.
    """
    if fields.get("block_size") is None:
        raise InvalidCheckpointError(
            "config.json lacks block_size; it is 4 unless the model's name says otherwise: add it"
        )
    return "qwen3", fields


def read(hf: PretrainedConfig) -> ModelConfig:
    diffusion = DiffusionConfig(hf.mask_token_id, span=hf.block_size)
    return replace(qwen3.read(hf), architecture=ARCHITECTURE, diffusion=diffusion)
