"""config.json as nobody should write it: a typed error at once, or the model that transformers makes of it."""

import json
import random
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mini_infer import kernels
from mini_infer.exceptions import MiniInferError
from mini_infer.models import load_model, read_config

from .checkpoints import FAMILIES, ROPE_SCALINGS, make_checkpoint
from .test_decoder import PagedRun

KERNELS = kernels.resolve("cpu")
TOKENS = [5, 1, 8, 3, 2, 9, 4]

STRANGE = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1.0, 0.5, -0.0, 1e-6, 1e308, float("nan"), float("inf"), -float("inf"),
    10**6, 10**12, 2**31, 2**63, 2**64, 10**30, "", "1", "silu", "default", "yarn", "float16", "\x00", "x" * 10_000,
    [], [1], [[1]], ["LlamaForCausalLM"], {}, {"a": 1}, {"rope_type": "yarn"}, [None] * 3, ["full_attention"] * 2,
    ["sliding_attention"] * 2, [0, 1], [1, 0, 1],
]  # fmt: skip


def mutate(draw: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """One to three changes somewhere in a config: another value, a missing or a new field, one moved elsewhere."""
    fields = json.loads(json.dumps(fields))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = fields
        key = draw.choice([*FIELDS, *fields])
        if isinstance(place.get(key), dict) and draw.random() < 0.8:
            place = place[key]
            key = draw.choice([*ROPE_FIELDS, *place])
        match draw.choice(("value", "value", "value", "number", "drop", "rope")):
            case "value":
                place[key] = deepcopy(draw.choice(STRANGE))
            case "number" if isinstance(place.get(key), int | float):
                place[key] = draw.choice((-place[key], place[key] * 2, place[key] + 1, float(place[key]), -1, 1e9))
            case "rope":
                place["rope_parameters"] = deepcopy(draw.choice([*ROPE_SCALINGS.values(), *STRANGE]))
            case _:
                place.pop(key, None)
    return fields


FIELDS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "dtype", "torch_dtype", "quantization_config", "transformers_weights",
    "original_max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map",
)  # fmt: skip
ROPE_FIELDS = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
    "short_factor", "long_factor", "partial_rotary_factor",
)  # fmt: skip


HARMLESS = {"model_type", "pad_token_id", "auto_map"}
"""Transformers raises for some values of these, though no model computes with them; `architectures` says the type."""


@pytest.mark.parametrize("num_changes", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_changes_of_a_config(tmp_path: Path, family: str, num_changes: int) -> None:
    path = make_checkpoint(
        tmp_path, family, 0, num_hidden_layers=2, rope_scaling=ROPE_SCALINGS["yarn"], tie_word_embeddings=False
    )
    fields = json.loads((path / "config.json").read_text())
    outcomes = Counter[str]()
    for seed in range(num_changes):
        changed = mutate(random.Random(f"{family} {seed}"), fields)
        (path / "config.json").write_text(json.dumps(changed))
        names = {name for name in {*fields, *changed} if changed.get(name, "gone") != fields.get(name, "gone")}
        what = f"{family} {seed}: " + ", ".join(f"{name}: {str(changed.get(name, 'gone'))[:100]}" for name in names)
        try:
            model = load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
        except MiniInferError as error:
            assert str(tmp_path) in str(error) and len(str(error)) < 1500, what
            outcomes["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(what) from error
        with torch.inference_mode():
            (logits,) = PagedRun(model, [TOKENS], 4, torch.float32).finish(0)
            try:
                theirs = transformers(path)
            except Exception:
                unread = HARMLESS | ({"sliding_window"} if family in ("llama", "olmo2") else set())
                assert names & unread, what
                rest = {name: value for name, value in changed.items() if name not in unread}
                (path / "config.json").write_text(json.dumps({**rest, "model_type": family, "pad_token_id": None}))
                theirs = transformers(path)
                outcomes["equal, and refused by transformers"] += 1
            torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4, msg=lambda text: f"{what}: {text}")  # noqa: B023
        outcomes["equal"] += 1
    assert outcomes["refused"] > 10 and outcomes["equal"] > 5, outcomes


def transformers(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model(torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": [["LlamaForCausalLM"]]}, "[['LlamaForCausalLM']]"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "yarn"),
        ({"dtype": {}}, "{}"),
        ({"vocab_size": 2**63}, f"vocab_size must be an integer from 1 to {2**31 - 1}; got {2**63}"),
        ({"head_dim": 10**12}, f"head_dim must be an integer from 1 to 65536; got {10**12}"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer from 1 to 1000; got 1000000"),
        ({"num_hidden_layers": 10**12}, f"got {10**12}"),
        ({"num_hidden_layers": 1000}, "has 21 tensors, too few for the 1000 layers"),
        ({"max_position_embeddings": 10**15}, f"got {10**15}"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite and not negative; got nan"),
        ({"rms_norm_eps": float("inf")}, "got inf"),
        ({"rms_norm_eps": -1e-6}, "got -1e-06"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": float("nan")}}, "nan"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": float("inf")}}, "inf is not a finite number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e12}}, "max_position_embeddings must be"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
            "low_freq_factor must be less",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]}},
            "one for each pair; got 1",
        ),
        ({"sliding_window": 0}, "sliding_window must be an integer from 1"),
        ({"sliding_window": -5}, "got -5"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_once(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    path = make_checkpoint(tmp_path, "mistral", 0, num_hidden_layers=2, rope_scaling=None)
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(MiniInferError) as raised:
        load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
    assert str(tmp_path) in str(raised.value) and words in str(raised.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000], ids=["lists", "objects"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_deep_file(tmp_path: Path, file: str, text: str) -> None:
    path = make_checkpoint(tmp_path, "llama", 0, max_shard_size="10KB")
    (path / file).write_text(text)
    with pytest.raises(MiniInferError, match=file):
        load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
