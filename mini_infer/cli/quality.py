"""``mini-infer quality``: what a model's quantisation costs, beside the model that it was made from."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mini_infer import kernels
from mini_infer.config import CheckpointOptions, EngineConfig
from mini_infer.engine.tokenizer import Tokenizer
from mini_infer.exceptions import InvalidConfigError
from mini_infer.executor.device import on, resolve_cache_dtype, resolve_dtype
from mini_infer.executor.quality import Quality, compare
from mini_infer.models import Decoder, load_model, read_config, resolve_model

TEXT = Path(__file__).parents[1] / "assets" / "quality.txt"
"""English and Chinese prose that was written for this."""


def show_quality(
    config: EngineConfig, against: str | None, text: Path | None, window: int, console: Console, as_json: bool
) -> None:
    """Load both models, compare them, and print what comes out.

    Raises:
        InvalidConfigError: the models have different vocabularies, or the text cannot be read or is too short.
    """
    base = replace(config, model=against or config.model, quantization=None, kv_cache_dtype="auto")
    if against is None and config == base:
        raise InvalidConfigError(
            "name the model to compare with, --against MODEL, or a --quantization or --kv-cache-dtype to be judged"
        )
    tokens = {which: _tokens(which, text or TEXT) for which in (config, base)}
    if tokens[config] != tokens[base]:
        raise InvalidConfigError(
            f"{config.model} and {base.model} have different tokenizers, so their predictions cannot be compared"
        )
    model, right = _load(config, window), _load(base, window)
    if model.config.vocab_size != right.config.vocab_size:
        raise InvalidConfigError(
            f"{config.model} knows {model.config.vocab_size} tokens and {base.model} {right.config.vocab_size}, so "
            "their predictions cannot be compared"
        )
    cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, model.dtype)
    quality = compare(model, right, tokens[config], window, cache_dtype)
    if as_json:
        facts = {
            "model": str(config.model),
            "quantization": config.quantization,
            "kv_cache_dtype": config.kv_cache_dtype,
            "against": str(base.model),
        }
        console.file.write(json.dumps({**facts, **asdict(quality)}, ensure_ascii=False, indent=2) + "\n")
    else:
        console.print(_table(config, base, quality))


def _tokens(config: EngineConfig, text: Path) -> list[int]:
    path = _path(config)
    tokenizer_path = path if config.tokenizer is None else resolve_model(str(config.tokenizer))
    tokenizer = Tokenizer(tokenizer_path, config, read_config(path).vocab_size)
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InvalidConfigError(f"the text {str(text)!r} cannot be read: {error}") from error
    token_ids = tokenizer.encode(words, len(words) + 1)
    if len(token_ids) < 2:
        raise InvalidConfigError(f"the text {str(text)!r} has {len(token_ids)} tokens; at least two are needed")
    return token_ids


def _path(config: CheckpointOptions) -> Path:
    return resolve_model(str(config.model), config.revision, config.cache_dir)


def _load(config: EngineConfig, window: int) -> Decoder:
    if config.device not in ("cpu", "auto"):
        raise InvalidConfigError(f"device={config.device!r}: quality is measured on the CPU")
    device = torch.device("cpu")
    path = _path(config)
    shape = read_config(path)
    with on(device):
        chosen = kernels.resolve(device, config.kernel_backend)
        dtype = resolve_dtype(config.dtype, shape.dtype, chosen)
        longest = min(window, shape.max_position_embeddings)
        return load_model(
            path, replace(shape, max_position_embeddings=longest), dtype, device, chosen, config.quantization
        )


def _table(config: EngineConfig, base: EngineConfig, quality: Quality) -> Table:
    name = f"{config.model}{f' as {config.quantization}' if config.quantization else ''}"
    if config.kv_cache_dtype != "auto":
        name += f" with KV in {config.kv_cache_dtype}"
    table = Table(title=f"{name} against {base.model}", title_justify="left", show_header=False)
    before = quality.base_bytes_per_weight
    spread = f"{quality.perplexity:.3f} ± {quality.perplexity_error:.3f}"
    rows = {
        "tokens · 词元": f"{quality.num_tokens:,}",
        "perplexity · 困惑度": f"{spread}, against {quality.base_perplexity:.3f}",
        "mean KLD · 平均 KL 散度": f"{quality.mean_kld:.5f} ± {quality.mean_kld_error:.5f} nats",
        "99.9 % KLD · 99.9% 分位": f"{quality.kld_999:.4f}, largest {quality.max_kld:.4f}",
        "same top token · 首选词元相同": f"{quality.same_top:.2%}",
        "bytes per weight · 每权重字节数": f"{quality.bytes_per_weight:.3f}, against {before:.3f}",
    }
    for title, value in rows.items():
        table.add_row(title, value)
    return table
