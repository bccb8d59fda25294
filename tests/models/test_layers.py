"""Layers of every kind that a config can describe, also those that no family has yet, against plain attention."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from mini_infer import kernels
from mini_infer.models import Decoder, ModelConfig
from mini_infer.models.config import AttentionConfig, FeedForwardConfig, LayerConfig
from mini_infer.models.linear import Linear, Weighted
from mini_infer.models.rope import LinearRope, Rope, rotary_tables

from .test_decoder import PagedRun

KERNELS = kernels.resolve("cpu")
EPS = 1e-5


def random_layer(draw: random.Random) -> LayerConfig:
    num_kv_heads = draw.choice((1, 2, 3))
    attention = AttentionConfig(
        num_heads=num_kv_heads * draw.choice((1, 2)),
        num_kv_heads=num_kv_heads,
        head_dim=draw.choice((8, 12)),
        rope=draw.choice((None, Rope(1e4), Rope(1e3), LinearRope(1e4, 3.0))),
        qkv_bias=draw.random() < 0.5,
        output_bias=draw.random() < 0.5,
        qk_norm=draw.choice((None, "head", "projection")),
        sliding_window=draw.choice((None, 1, 5)),
    )
    feed_forward = FeedForwardConfig(draw.choice((24, 30)), bias=draw.random() < 0.5)
    return LayerConfig(attention, feed_forward, draw.choice(("pre", "post", "both")))


def filled(model: Decoder, seed: int) -> dict[str, Tensor]:
    """Give a model random weights, and return them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, Weighted):
            for name, parameter in list(module.named_parameters(recurse=False)):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                noise = 1 + 0.3 * noise if path.endswith("norm") else 2 * noise / parameter.shape[-1] ** 0.5
                weights[f"{path}.{name}"] = noise
                setattr(module, name, torch.nn.Parameter(noise.clone(), requires_grad=False))
            module.finish()
    return weights


def reference(config: ModelConfig, weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Logits ``[T, vocab]`` of one whole text, with no cache and no fused operation."""

    def linear(path: str, x: Tensor) -> Tensor:
        return x @ weights[f"{path}.weight"].T + weights.get(f"{path}.bias", torch.zeros(()))

    def norm(path: str, x: Tensor) -> Tensor:
        weight = weights.get(f"{path}.weight")
        return x if weight is None else rms_norm(x, weight.shape, weight, EPS)

    def attend(path: str, x: Tensor, attention: AttentionConfig) -> Tensor:
        sizes = [n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)]
        query, key, value = linear(f"{path}.qkv_proj", x).split(sizes, dim=1)
        if attention.qk_norm == "projection":
            query, key = norm(f"{path}.q_norm", query), norm(f"{path}.k_norm", key)
        query, key, value = (part.unflatten(1, (-1, attention.head_dim)) for part in (query, key, value))
        if attention.qk_norm == "head":
            query, key = norm(f"{path}.q_norm", query), norm(f"{path}.k_norm", key)
        if attention.rope is not None:
            cos, sin = rotary_tables(attention.rope, attention.head_dim, len(x))
            query, key = turned(query, cos, sin), turned(key, cos, sin)
        group = attention.num_heads // attention.num_kv_heads
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / attention.head_dim**0.5
        back = torch.arange(len(x))[:, None] - torch.arange(len(x))
        hidden = (back < 0) | (back >= (attention.sliding_window or len(x)))
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)
        return linear(f"{path}.o_proj", out.flatten(1))

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos[:, None].double(), sin[:, None].double()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    x = weights["embedding.weight"][torch.tensor(tokens)]
    for number, layer in enumerate(config.layers):
        path = f"layers.{number}"
        attended = attend(f"{path}.attention", norm(f"{path}.attention_norm", x), layer.attention)
        x = x + norm(f"{path}.attention_post_norm", attended)
        gate, up = linear(f"{path}.feed_forward.gate_up_proj", norm(f"{path}.feed_forward_norm", x)).chunk(2, dim=1)
        x = x + norm(f"{path}.feed_forward_post_norm", linear(f"{path}.feed_forward.down_proj", silu(gate) * up))
    return linear("output", norm("norm", x))


@pytest.mark.parametrize("seed", range(12))
def test_random_layers(seed: int) -> None:
    draw = random.Random(seed)
    layers = tuple(random_layer(draw) for _ in range(draw.randint(1, 4)))
    shape: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "max_position_embeddings": 64, "rms_norm_eps": EPS}
    config = ModelConfig("any", layers=layers, tie_word_embeddings=False, dtype=None, **shape)
    model = Decoder(config, torch.float64, "cpu", KERNELS)
    num_parameters = model.num_parameters
    weights = filled(model, seed)
    assert num_parameters == sum(weight.numel() for weight in weights.values())
    assert not any(module.weight is not None for module in model.modules() if isinstance(module, Linear))
    texts = [[draw.randrange(50) for _ in range(length)] for length in (23, 1, 9)]
    with torch.inference_mode():
        computed = PagedRun(model, texts, block_size=4, dtype=torch.float64).finish(seed)
    for text, logits in zip(texts, computed, strict=True):
        torch.testing.assert_close(logits, reference(config, weights, text), rtol=0, atol=1e-9)
