"""Reading config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer.exceptions import InvalidCheckpointError, ModelNotFoundError, UnsupportedModelError
from mini_infer.models import ModelConfig, hf_config, read_config
from mini_infer.models.config import AttentionConfig, FeedForwardConfig, LayerConfig
from mini_infer.models.rope import LinearRope, Llama3Rope, LongRope, Rope, YarnRope

from .checkpoints import FAMILIES, ROPE_SCALINGS, random_config

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}

ROPE_CLASSES = {"default": Rope, "linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope, "longrope": LongRope}


def write(directory: Path, fields: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory


def llama(**fields: Any) -> dict[str, Any]:
    """A small Llama's config.json in the style of transformers 4."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        **fields,
    }


def qwen3(**fields: Any) -> dict[str, Any]:
    return llama(architectures=["Qwen3ForCausalLM"], model_type="qwen3", **fields)


def test_llama_3_1_8b(tmp_path: Path) -> None:
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    assert read_config(write(tmp_path, fields)) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        layers=(
            LayerConfig(
                AttentionConfig(
                    num_heads=32,
                    num_kv_heads=8,
                    head_dim=128,
                    qkv_bias=False,
                    output_bias=False,
                    qk_norm=None,
                    rope=Llama3Rope(500000.0, 8.0, 1.0, 4.0, 8192),
                    sliding_window=None,
                ),
                FeedForwardConfig(intermediate_size=14336, bias=False),
                norms="pre",
            ),
        )
        * 32,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    return tuple(layer.attention.sliding_window for layer in config.layers)


def test_what_a_config_leaves_out_is_the_familys_default(tmp_path: Path) -> None:
    mistral = read_config(write(tmp_path, {"architectures": ["MistralForCausalLM"]}))
    assert mistral.layers[0].attention.num_kv_heads == 8
    assert windows(mistral) == (4096,) * 32
    assert mistral.dtype is None
    qwen2 = read_config(write(tmp_path, {"architectures": ["Qwen2ForCausalLM"]}))
    attention = qwen2.layers[0].attention
    assert (attention.qkv_bias, attention.output_bias, qwen2.vocab_size) == (True, False, 151936)
    qwen3 = read_config(write(tmp_path, {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64}))
    attention = qwen3.layers[0].attention
    assert (attention.head_dim, attention.qk_norm, attention.qkv_bias) == (128, "head", False)
    smollm3 = read_config(write(tmp_path, {"architectures": ["SmolLM3ForCausalLM"]}))
    assert [layer.attention.rope for layer in smollm3.layers] == [Rope(2e6), Rope(2e6), Rope(2e6), None] * 9


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_styles_of_config_say_the_same(tmp_path: Path, family: str, scaling: str) -> None:
    scaled = ROPE_SCALINGS[scaling]
    hf = random_config(family, 5, rope_scaling=scaled, num_hidden_layers=3, architectures=[ARCHITECTURES[family]])
    fields = hf.to_dict()
    for name in ("rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype"):
        fields.pop(name, None)
    version_4 = {**fields, "rope_theta": 7e4, "rope_scaling": scaled, "torch_dtype": "float16"}
    old = read_config(write(tmp_path, version_4))
    rope = next(layer.attention.rope for layer in old.layers if layer.attention.rope is not None)
    assert (rope.theta, type(rope), old.dtype) == (7e4, ROPE_CLASSES[scaling.split("-")[0]], torch.float16)
    version_5 = {**fields, "rope_parameters": {"rope_theta": 7e4, **(scaled or {"rope_type": "default"})}}
    assert read_config(write(tmp_path, {**version_5, "dtype": "float16"})) == old


def test_the_oldest_spelling_of_rope_scaling(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, llama(rope_scaling={"type": "linear", "factor": 2.0})))
    assert config.layers[0].attention.rope == LinearRope(10000.0, 2.0)


def test_one_rope_written_per_layer_type() -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    hf = random_config("qwen3", 0, architectures=["Qwen3ForCausalLM"])
    hf.rope_parameters = {"full_attention": rope, "sliding_attention": dict(rope)}
    assert hf_config.rope(hf) == LinearRope(5e4, 2.0)
    hf.rope_parameters["sliding_attention"]["rope_theta"] = 1e4
    with pytest.raises(UnsupportedModelError, match="share one RoPE"):
        hf_config.rope(hf)


def test_yarn_may_leave_its_factor_to_the_context_lengths() -> None:
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    hf = random_config("llama", 0, max_position_embeddings=512, architectures=["LlamaForCausalLM"])
    hf.rope_parameters = {"rope_theta": 1e4, **scaling}
    rope = hf_config.rope(hf)
    assert isinstance(rope, YarnRope)
    assert rope.factor == 4.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, None)),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            (8, None),
        ),
    ],
    ids=["off", "upper-layer", "no-layer", "no-window", "layer-types"],
)
def test_qwens_sliding_windows(tmp_path: Path, fields: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert windows(read_config(write(tmp_path, qwen3(**fields)))) == expected


def test_a_field_that_the_family_does_not_have_means_nothing(tmp_path: Path) -> None:
    strange = {"sliding_window": 8, "attention_bias": True, "mlp_bias": True}
    config = read_config(write(tmp_path, llama(**strange)))
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    assert (windows(config), attention.qkv_bias, feed_forward.bias) == ((None, None), True, True)
    mistral = llama(architectures=["MistralForCausalLM"], model_type="mistral", **strange)
    config = read_config(write(tmp_path, mistral))
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    assert windows(config) == (8, 8)
    assert not (attention.qkv_bias or attention.output_bias or feed_forward.bias)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": None}, ["None", "MistralForCausalLM"]),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, ["one model"]),
        ({"model_type": "mixtral"}, ["mixtral"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, ["quantization_config", "bits", "3"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["bitsandbytes", "compressed-tensors", "awq"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "batch"]),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, ["proportional", "yarn", "longrope"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["float8_e4m3fn", "bfloat16"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unsupported(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        read_config(write(tmp_path, llama(**fields)))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "wide"}, ["wide"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
        ({"num_key_value_heads": 3}, ["3", "num_kv_heads"]),
        ({"head_dim": 15}, ["15"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "big"}}, ["big"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, ["0"]),
        ({"rope_theta": -1.0}, ["-1"]),
        ({"torch_dtype": "bfloat17"}, ["bfloat17"]),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_invalid(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((InvalidCheckpointError, UnsupportedModelError)) as raised:
        read_config(write(tmp_path, llama(**fields)))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(raised.value)


def test_layer_types_must_cover_the_layers(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match=r"layer"):
        read_config(write(tmp_path, qwen3(layer_types=["full_attention"])))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"architectures"'], ids=repr)
def test_malformed_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidCheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelNotFoundError, match=r"config\.json does not exist"):
            read_config(directory)


def test_code_beside_the_config_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('code of a checkpoint was run')")
    auto_map = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    assert read_config(write(tmp_path, llama(auto_map=auto_map))).num_layers == 2
