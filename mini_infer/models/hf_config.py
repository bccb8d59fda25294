"""From config.json to transformers' view of it, and from that to the parts of a `ModelConfig`.

Transformers' config classes know every family's defaults and every spelling that a field has had. What they let pass
is looked at here: a number that cannot be, an option that would change what the model computes.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from mini_infer.exceptions import InvalidCheckpointError, ModelNotFoundError, UnsupportedModelError
from mini_infer.models.config import DTYPES, LARGEST_SIZE, AttentionConfig, LayerConfig, ModelConfig
from mini_infer.models.quantization import read_quantization
from mini_infer.models.rope import (
    LinearRope,
    Llama3Rope,
    LongRope,
    Rope,
    YarnRope,
    longrope_attention_factor,
    yarn_attention_factor,
)

_LARGEST = {
    "vocab_size": LARGEST_SIZE,
    "hidden_size": LARGEST_SIZE,
    "intermediate_size": LARGEST_SIZE,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": LARGEST_SIZE,
}
"""More of these is a mistake, or an attack: each layer and each rotary feature costs time before any weight is read."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a checkpoint.

    Raises:
        ModelNotFoundError: there is no such file.
        InvalidCheckpointError: it holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(
            f"{path} does not exist; a model directory holds config.json, *.safetensors and a tokenizer"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpointError(f"{path} cannot be read as JSON: {error}; fetch the file again") from error
    if not isinstance(fields, dict):
        raise InvalidCheckpointError(f"{path} must hold a JSON object; got {type(fields).__name__}")
    return fields


def hf_config(model_type: str, fields: dict[str, Any]) -> PretrainedConfig:
    """Transformers' config of this type.

    Raises:
        InvalidCheckpointError: a field cannot be used.
    """
    for name, largest in _LARGEST.items():
        value = fields.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise InvalidCheckpointError(f"{name} must be an integer from 1 to {largest}; got {_short(value)}")
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # which exception a bad field raises differs by field and by transformers version
        reason = shorten(" ".join(str(error).split()))
        raise InvalidCheckpointError(f"no valid {model_type} config: {type(error).__name__}: {reason}") from error


def model_config(hf: PretrainedConfig, architecture: str, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    """What all families have in common, around a family's layers.

    Raises:
        InvalidCheckpointError: the fields contradict each other.
        UnsupportedModelError: they describe a model that Mini-Infer does not implement.
    """
    if hf.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act must be 'silu'; got {_short(hf.hidden_act)}")
    if getattr(hf, "transformers_weights", None):
        raise UnsupportedModelError(
            f"transformers_weights names another file of weights, {_short(hf.transformers_weights)}; rename that to "
            "model.safetensors and remove the field"
        )
    limit, ropes = hf.max_position_embeddings, {layer.attention.rope for layer in layers}
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=layers,
        max_position_embeddings=max([limit, *(rope.reach(limit) for rope in ropes if rope is not None)]),
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        dtype=_dtype(hf),
        quantization=read_quantization(getattr(hf, "quantization_config", None)),
    )


def attention(hf: PretrainedConfig, **options: Any) -> AttentionConfig:
    """Attention with the heads and the RoPE of a config, and whatever else its family says."""
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return AttentionConfig(hf.num_attention_heads, hf.num_key_value_heads, head_dim, rope(hf), **options)


def sliding_windows(hf: PretrainedConfig) -> tuple[int | None, ...]:
    """The window of each layer, where ``layer_types`` says which of them have one."""
    unknown = set(hf.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"layer_types may be full_attention or sliding_attention; got {sorted(unknown)}")
    if len(hf.layer_types) != hf.num_hidden_layers:
        raise InvalidCheckpointError(
            f"{hf.num_hidden_layers} layers need as many layer_types; got {len(hf.layer_types)}"
        )
    if hf.sliding_window is None and "sliding_attention" in hf.layer_types:
        raise InvalidCheckpointError("layer_types has sliding_attention but sliding_window is not set, or not used")
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)


def rope(hf: PretrainedConfig) -> Rope:
    """How the model rotates queries and keys.

    Raises:
        InvalidCheckpointError: the parameters cannot be used.
        UnsupportedModelError: a kind of scaling that Mini-Infer does not implement.
    """
    hf.standardize_rope_params()  # as its models do before they compute; some fields have moved only then
    parameters = hf.rope_parameters
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    if per_layer_type:
        if any(value != per_layer_type[0] for value in per_layer_type):
            raise UnsupportedModelError(f"all layers must share one RoPE; got rope_parameters {_short(parameters)}")
        parameters = per_layer_type[0]
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic":
        raise UnsupportedModelError(
            "rope type 'dynamic' is refused: its frequencies change with the longest text met so far, so a sequence's "
            "cached keys would depend on the others in its batch; use 'yarn', which needs no such state"
        )
    if not isinstance(kind, str) or kind not in _ROPE_READERS:
        raise UnsupportedModelError(
            f"rope type {_short(kind)} is not supported; supported are {', '.join(_ROPE_READERS)}"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"partial_rotary_factor must be 1 for these models; got {_short(parameters['partial_rotary_factor'])}"
        )
    try:
        return _ROPE_READERS[kind](parameters, hf.max_position_embeddings)
    except KeyError as error:
        raise InvalidCheckpointError(f"rope type {kind!r} needs {error}; got {_short(parameters)}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InvalidCheckpointError(f"rope parameters {_short(parameters)} cannot be used: {error}") from error


def _default_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    return Rope(_number(parameters["rope_theta"]))


def _linear_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    return LinearRope(_number(parameters["rope_theta"]), _number(parameters["factor"]))


def _llama3_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    return Llama3Rope(
        theta=_number(parameters["rope_theta"]),
        factor=_number(parameters["factor"]),
        low_freq_factor=_number(parameters["low_freq_factor"]),
        high_freq_factor=_number(parameters["high_freq_factor"]),
        original_max_positions=_number(parameters["original_max_position_embeddings"]),
    )


def _yarn_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    original, factor = _extension(parameters, max_positions)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, parameters.get("mscale"), parameters.get("mscale_all_dim"))
    return YarnRope(
        theta=_number(parameters["rope_theta"]),
        factor=factor,
        original_max_positions=original,
        beta_fast=_number(parameters.get("beta_fast") or 32),
        beta_slow=_number(parameters.get("beta_slow") or 1),
        attention_factor=_number(attention_factor),
        truncate=bool(parameters.get("truncate", True)),
    )


def _long_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    original, factor = _extension(parameters, max_positions)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = longrope_attention_factor(factor, original)
    return LongRope(
        theta=_number(parameters["rope_theta"]),
        factor=factor,
        original_max_positions=original,
        short_factors=tuple(_number(number) for number in parameters["short_factor"]),
        long_factors=tuple(_number(number) for number in parameters["long_factor"]),
        attention_factor=_number(attention_factor),
    )


def _extension(parameters: Mapping[str, Any], max_positions: int) -> tuple[float, float]:
    """The context that a model was trained with first, and how many times as long it was made."""
    original, factor = _number(parameters["original_max_position_embeddings"]), parameters.get("factor")
    return original, max_positions / original if factor is None else _number(factor)


_ROPE_READERS: Mapping[str, Callable[[Mapping[str, Any], int], Rope]] = {
    "default": _default_rope,
    "linear": _linear_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
    "longrope": _long_rope,
}


def _number(value: object) -> float:
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    if not math.isfinite(number) or (isinstance(value, int) and abs(value) >= 2**63):  # which no tensor can hold
        raise ValueError(f"{_short(value)} is not a finite number")
    return number


def _dtype(hf: PretrainedConfig) -> torch.dtype | None:
    dtype = getattr(torch, hf.dtype, hf.dtype) if isinstance(hf.dtype, str) else hf.dtype
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES):
        return dtype
    names = ", ".join(sorted(str(supported).removeprefix("torch.") for supported in DTYPES))
    raise UnsupportedModelError(f"dtype must be one of {names}; got {_short(dtype)}")


def shorten(text: str) -> str:
    """What a checkpoint says, for a message: it cannot make that arbitrarily long."""
    return text if len(text) <= 300 else f"{text[:300]}..."


def _short(value: object) -> str:
    return shorten(repr(value))
