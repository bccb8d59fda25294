"""From a checkpoint to logits: its config, its weights, and the decoder that they make."""

from mini_infer.models.batch import Batch
from mini_infer.models.config import DiffusionConfig, ModelConfig
from mini_infer.models.decoder import Decoder
from mini_infer.models.families import read_config
from mini_infer.models.hub import resolve_model, resolve_tokenizer
from mini_infer.models.weights import load_model

__all__ = [
    "Batch",
    "Decoder",
    "DiffusionConfig",
    "ModelConfig",
    "load_model",
    "read_config",
    "resolve_model",
    "resolve_tokenizer",
]
