"""Random checkpoints in LLaDA's format, and a plain model of them: the paper's, on one sequence, in float64."""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

MASK = 259


@dataclass
class Cache:
    """What each pass over a whole sequence leaves to those over a part of it.

    Attributes:
        start, end: that part.
        share: of the tokens outside of it, how many stay: those that the mean of its queries scores highest, once each
            score is the largest of three neighbours.
        by_head: KV heads choose for themselves, by the highest score of their query heads; else all by the sum.
        layers: keys and values of each layer, ``[num_heads, num_kept, head_dim]``.
    """

    start: int
    end: int
    share: float = 1.0
    by_head: bool = True
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def fill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, group: int) -> None:
        outside = [i for i in range(q.shape[1]) if not self.start <= i < self.end]
        count = math.floor(self.share * len(outside))
        mean = q[:, self.start : self.end].mean(dim=1)
        scores = [[float(mean[h] @ k[h, i]) for i in outside] for h in range(len(q))]
        kept = []
        for h in range(len(q)):
            first = h // group * group
            heads = scores[first : first + group] if self.by_head else scores
            raw = [(max if self.by_head else sum)(column) for column in zip(*heads, strict=True)]
            pooled = [max(raw[max(i - 1, 0) : i + 2]) for i in range(len(raw))]
            best = sorted(range(len(raw)), key=lambda i: (-pooled[i], i))[:count]
            kept.append([outside[i] for i in best])
        self.layers[layer] = tuple(torch.stack([x[h, kept[h]] for h in range(len(x))]) for x in (k, v))  # type: ignore[assignment]


def make_llada_checkpoint(path: Path, seed: int, dtype: torch.dtype = torch.float64, **overrides: Any) -> Path:
    """A model whose shape and weights are drawn from ``seed``; ``overrides`` are config.json's own names."""
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2))
    config: dict[str, Any] = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "n_layers": draw.choice((1, 2, 3)),
        "n_heads": kv_heads * draw.choice((1, 2)),
        "n_kv_heads": kv_heads,
        "mlp_hidden_size": draw.choice((24, 40)),
        "max_sequence_length": 256,
        "vocab_size": 262,
        "embedding_size": 262,
        "mask_token_id": MASK,
        "eos_token_id": 256,
        "rope_theta": draw.choice((1e3, 1e4)),
        "rms_norm_eps": 1e-5,
        "weight_tying": draw.random() < 0.5,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **overrides,
    }
    config.setdefault("d_model", config["n_heads"] * draw.choice((8, 12)))
    size, inner, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv_size = size // config["n_heads"] * config["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocab, size), "ln_f": (size,)}
    if not config["weight_tying"]:
        shapes["ff_out"] = (vocab, size)
    for layer in range(config["n_layers"]):
        shapes |= {
            f"blocks.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (size,),
                "ff_norm": (size,),
                "q_proj": (size, size),
                "k_proj": (kv_size, size),
                "v_proj": (kv_size, size),
                "attn_out": (size, size),
                "ff_proj": (inner, size),
                "up_proj": (inner, size),
                "ff_out": (size, inner),
            }.items()
        }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight = 1 + 0.3 * noise if len(shape) == 1 else 2 * noise / shape[-1] ** 0.5
        weights[f"model.transformer.{name}.weight"] = weight.to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, path / "model.safetensors")
    return path


class PlainLLaDA:
    """Logits of every token of one sequence, each of which sees all others.

    With a cache and ``reuse`` only its part is computed, and sees what an earlier call without left there.
    """

    def __init__(self, path: Path) -> None:
        self.config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.weights = {name: w.double() for name, w in load_file(path / "model.safetensors").items()}

    def __call__(self, token_ids: list[int], cache: Cache | None = None, reuse: bool = False) -> Tensor:
        config = self.config
        num_heads, num_kv_heads = config["n_heads"], config["n_kv_heads"]
        head_dim = config["d_model"] // num_heads
        start, end = (cache.start, cache.end) if cache is not None and reuse else (0, len(token_ids))
        frequencies = config["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        turns = torch.polar(
            torch.ones(end - start, head_dim // 2, dtype=torch.float64),
            torch.outer(torch.arange(start, end, dtype=torch.float64), frequencies),
        )

        def weight(name: str) -> Tensor:
            return self.weights[f"model.transformer.{name}.weight"]

        def norm(x: Tensor, name: str) -> Tensor:
            return functional.rms_norm(x, (x.shape[-1],), weight(name), config["rms_norm_eps"])

        def heads(x: Tensor, count: int, turned: bool) -> Tensor:
            x = x.unflatten(-1, (count, head_dim)).transpose(0, 1)  # [heads, T, head_dim]
            if turned:
                pairs = torch.complex(*x.chunk(2, dim=-1)) * turns
                x = torch.cat((pairs.real, pairs.imag), dim=-1)
            return x.repeat_interleave(num_heads // count, dim=0)

        x = weight("wte")[token_ids[start:end]]
        for layer in range(config["n_layers"]):
            at = f"blocks.{layer}"
            normed = norm(x, f"{at}.attn_norm")
            q = heads(normed @ weight(f"{at}.q_proj").T, num_heads, True)
            k = heads(normed @ weight(f"{at}.k_proj").T, num_kv_heads, True)
            v = heads(normed @ weight(f"{at}.v_proj").T, num_kv_heads, False)
            if cache is not None and reuse:
                k, v = (torch.cat((old, new), dim=1) for old, new in zip(cache.layers[layer], (k, v), strict=True))
            elif cache is not None:
                cache.fill(layer, q, k, v, num_heads // num_kv_heads)
            scores = (q @ k.transpose(1, 2) / head_dim**0.5).softmax(dim=-1)
            x = x + (scores @ v).transpose(0, 1).flatten(1) @ weight(f"{at}.attn_out").T
            normed = norm(x, f"{at}.ff_norm")
            gate = functional.silu(normed @ weight(f"{at}.ff_proj").T)
            x = x + (gate * (normed @ weight(f"{at}.up_proj").T)) @ weight(f"{at}.ff_out").T
        return norm(x, "ln_f") @ weight("wte" if config["weight_tying"] else "ff_out").T
