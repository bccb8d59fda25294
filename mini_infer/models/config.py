"""What a checkpoint's config.json says about the model, in one shape for every family."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from mini_infer.exceptions import InvalidCheckpointError, ModelNotFoundError, UnsupportedModelError
from mini_infer.models.rope import LinearRope, Llama3Rope, Rope, YarnRope, yarn_attention_factor

FAMILIES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The architectures that `Decoder` implements, each with transformers' name for its config."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)

DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and options; what a family always has (Qwen2's biases, Qwen3's norms) is spelled out too.

    Attributes:
        architecture: one of `FAMILIES`.
        vocab_size: rows of the embedding, which may exceed the tokenizer's vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width between the two halves of a feed-forward layer.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves num_heads / num_kv_heads query heads.
        head_dim: features per head; num_heads * head_dim need not be hidden_size.
        max_position_embeddings: the longest context, in tokens.
        rms_norm_eps: keeps the norm of a zero vector finite.
        tie_word_embeddings: the output projection is the embedding.
        qkv_bias: the query, key and value projections have biases.
        output_bias: attention's output projection has one.
        mlp_bias: the feed-forward projections have biases.
        qk_norm: every query and key head is normalised before its rotation.
        sliding_windows: per layer, how many of the latest tokens a token sees, itself included; None is all.
        rope: how queries and keys are rotated.
        dtype: of the checkpoint's weights; None where its config does not say.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope: Rope
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidCheckpointError(f"{name} must be a positive integer; got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidCheckpointError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InvalidCheckpointError(f"head_dim must be even, for RoPE turns pairs; got {self.head_dim}")
        if len(self.sliding_windows) != self.num_layers:
            raise InvalidCheckpointError(
                f"{self.num_layers} layers need as many attention types; got {len(self.sliding_windows)}"
            )

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ModelConfig":
        """Read ``directory/config.json``, as written by transformers 4 or 5. No code in the directory is run.

        Raises:
            ModelNotFoundError: there is no such directory, or no config.json in it.
            InvalidCheckpointError: the file is malformed or contradicts itself.
            UnsupportedModelError: it describes a model that Mini-Infer does not implement.
        """
        path = Path(directory) / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFoundError(
                f"{path} does not exist; a model directory holds config.json, *.safetensors and a tokenizer"
            ) from None
        except (OSError, ValueError) as error:
            raise InvalidCheckpointError(f"{path} cannot be read as JSON: {error}; fetch the file again") from error
        if not isinstance(fields, dict):
            raise InvalidCheckpointError(f"{path} must hold a JSON object; got {type(fields).__name__}")
        try:
            family = FAMILIES[_architecture(fields.get("architectures"))]
            if fields.get("model_type", family) != family:
                raise UnsupportedModelError(
                    f"model_type {fields['model_type']!r} does not go with architectures {fields['architectures']}"
                )
            return cls.from_hf(_hf_config(family, fields))
        except (InvalidCheckpointError, UnsupportedModelError) as error:
            raise type(error)(f"{path}: {error}") from error.__cause__

    @classmethod
    def from_hf(cls, hf: PretrainedConfig) -> "ModelConfig":
        """Translate a transformers config, whose class has filled in the family's defaults.

        Raises:
            InvalidCheckpointError: the fields contradict each other.
            UnsupportedModelError: it describes a model that Mini-Infer does not implement.
        """
        architecture = _architecture(hf.architectures)
        if getattr(hf, "quantization_config", None):
            raise UnsupportedModelError(
                "quantized checkpoints (quantization_config) are not supported; use the unquantized model"
            )
        if hf.hidden_act != "silu":
            raise UnsupportedModelError(f"hidden_act must be 'silu'; got {hf.hidden_act!r}")
        # Ask only for what the family has: a field that its transformers class ignores must mean nothing here, too.
        is_llama, is_qwen3 = architecture == "LlamaForCausalLM", architecture == "Qwen3ForCausalLM"
        attention_bias = (is_llama or is_qwen3) and hf.attention_bias
        return cls(
            architecture=architecture,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // max(hf.num_attention_heads, 1),
            max_position_embeddings=hf.max_position_embeddings,
            rms_norm_eps=hf.rms_norm_eps,
            tie_word_embeddings=hf.tie_word_embeddings,
            qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
            output_bias=attention_bias,
            mlp_bias=is_llama and hf.mlp_bias,
            qk_norm=is_qwen3,
            sliding_windows=(None,) * hf.num_hidden_layers if is_llama else _sliding_windows(hf),
            rope=_rope(hf),
            dtype=_dtype(hf),
        )


def _architecture(architectures: object) -> str:
    supported = f"supported are {', '.join(FAMILIES)}"
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise UnsupportedModelError(f"architectures must name one model; got {architectures!r}; {supported}")
    if architectures[0] not in FAMILIES:
        raise UnsupportedModelError(f"architecture {architectures[0]} is not supported; {supported}")
    return str(architectures[0])


def _hf_config(family: str, fields: dict[str, Any]) -> PretrainedConfig:
    try:
        return CONFIG_MAPPING[family].from_dict(fields)
    except Exception as error:  # which exception a bad field raises differs by field and by transformers version
        reason = " ".join(str(error).split())
        raise InvalidCheckpointError(f"no valid {family} config: {type(error).__name__}: {reason}") from error


def _dtype(hf: PretrainedConfig) -> torch.dtype | None:
    dtype = hf.dtype if hasattr(hf, "dtype") else hf.torch_dtype  # renamed in transformers 4.56
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is None or dtype in DTYPES:
        return dtype
    names = ", ".join(sorted(str(supported).removeprefix("torch.") for supported in DTYPES))
    raise UnsupportedModelError(f"dtype must be one of {names}; got {dtype}")


def _sliding_windows(hf: PretrainedConfig) -> tuple[int | None, ...]:
    window = getattr(hf, "sliding_window", None)
    if not getattr(hf, "use_sliding_window", True):  # Qwen's switch; transformers 5 clears the window itself
        window = None
    first = getattr(hf, "max_window_layers", 0)  # Qwen2 leaves its lower layers unlimited
    layer_types = getattr(hf, "layer_types", None) or [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(hf.num_hidden_layers)
    ]
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"layer_types may be full_attention or sliding_attention; got {sorted(unknown)}")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _rope(hf: PretrainedConfig) -> Rope:
    parameters = getattr(hf, "rope_parameters", None)
    if parameters is None:  # transformers 4: theta beside an optional dictionary
        parameters = {
            "rope_theta": hf.rope_theta,
            "partial_rotary_factor": getattr(hf, "partial_rotary_factor", None),
            **(getattr(hf, "rope_scaling", None) or {}),
        }
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    if per_layer_type:
        if any(value != per_layer_type[0] for value in per_layer_type):
            raise UnsupportedModelError(f"all layers must share one RoPE; got rope_parameters {parameters}")
        parameters = per_layer_type[0]

    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "dynamic":
        raise UnsupportedModelError(
            "rope type 'dynamic' is refused: its frequencies change with the longest text met so far, so a sequence's "
            "cached keys would depend on the others in its batch; use 'yarn', which needs no such state"
        )
    if kind not in _ROPE_READERS:
        raise UnsupportedModelError(f"rope type {kind!r} is not supported; supported are {', '.join(_ROPE_READERS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"partial_rotary_factor must be 1 for these models; got {parameters['partial_rotary_factor']}"
        )
    try:
        rope = _ROPE_READERS[kind](parameters, hf.max_position_embeddings)
        if not rope.frequencies(rotary_dim=64).isfinite().all():
            raise ValueError("they give infinite frequencies")
    except KeyError as error:
        raise InvalidCheckpointError(f"rope type {kind!r} needs {error}; got {parameters}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InvalidCheckpointError(f"rope parameters {parameters} cannot be used: {error}") from error
    return rope


def _default_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    return Rope(float(parameters["rope_theta"]))


def _linear_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    return LinearRope(float(parameters["rope_theta"]), float(parameters["factor"]))


def _llama3_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    return Llama3Rope(
        theta=float(parameters["rope_theta"]),
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_positions=int(parameters.get("original_max_position_embeddings") or max_positions),
    )


def _yarn_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    original = int(parameters.get("original_max_position_embeddings") or max_positions)
    factor = max_positions / original if parameters["factor"] is None else float(parameters["factor"])
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, parameters.get("mscale"), parameters.get("mscale_all_dim"))
    return YarnRope(
        theta=float(parameters["rope_theta"]),
        factor=factor,
        original_max_positions=original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        attention_factor=float(attention_factor),
        truncate=bool(parameters.get("truncate", True)),
    )


_ROPE_READERS: Mapping[str, Callable[[Mapping[str, Any], int], Rope]] = {
    "default": _default_rope,
    "linear": _linear_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
}
