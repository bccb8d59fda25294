"""Filling a decoder from safetensors files; the one place that knows how checkpoints name their tensors.

Each tensor is mapped from its file and copied straight to where it belongs, which may be a slice of a fused
parameter, changing dtype and device on the way; a weight is then packed as the kernels want it, and let go of. Files
are mapped for one layer at a time. So loading needs the model's own memory plus one layer's.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mini_infer.exceptions import InvalidCheckpointError, OutOfMemoryError
from mini_infer.kernels import Kernels, large_memory
from mini_infer.models.config import DTYPES, ModelConfig
from mini_infer.models.decoder import Decoder, Layer, Linear

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_model(directory: str | Path, config: ModelConfig, dtype: torch.dtype, device: str | torch.device, kernels: Kernels) -> Decoder:
    """Build the decoder that `config` describes and fill it from the safetensors files in `directory`.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and the files it names.
        config: from `ModelConfig.from_directory`. A smaller max_position_embeddings saves rotary tables never used.
        dtype: of all parameters; tensors are converted as they are read.
        device: where the parameters live.

    Raises:
        InvalidCheckpointError: a file or tensor is missing, unexpected, misshapen or unreadable.
        OutOfMemoryError: the device cannot hold the weights.
    """
    directory = Path(directory)
    files = weight_files(directory)
    where = _tensor_names(files)
    with _explaining_memory(directory, config, dtype, device, kernels):
        model = Decoder(config, dtype, device, kernels)
        groups = _groups(model)
        _check_names(
            where.keys(), [part.name for group in groups for fill in group for part in fill.parts], config, directory
        )
        for group in groups:
            with ExitStack() as stack:
                needed = {where[part.name] for fill in group for part in fill.parts}
                readers = {path: stack.enter_context(_reading(path)) for path in needed}
                for fill in group:
                    _fill(fill, where, readers, dtype, device)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `directory`; all of them exist.

    Raises:
        InvalidCheckpointError: there are none, or one that the index names is missing.
    """
    index = directory / INDEX_FILE
    if index.exists():
        files = [directory / name for name in _shard_names(index)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise InvalidCheckpointError(
                f"{directory} lacks {_few(missing)}, named by {INDEX_FILE}; the download is incomplete, fetch it again"
            )
        return files
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise InvalidCheckpointError(
            f"{directory} holds only pickled weights ({_few(pickles)}), which could run code when read; save the model "
            "again with transformers' save_pretrained, or choose a revision that has safetensors"
        )
    raise InvalidCheckpointError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; if it was downloaded, fetch it again"
    )


def _shard_names(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"weight_map must name files beside it; got {sorted(names)}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidCheckpointError(
            f"{index} cannot be used: {type(error).__name__}: {error}; fetch the file again"
        ) from error
    return sorted(names)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """A safetensors reader; whatever is wrong with the file is an `InvalidCheckpointError`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpointError(
            f"{path} cannot be read as safetensors: {error}; it is truncated, corrupt or a Git LFS pointer: fetch it "
            "again (in a Git clone: git lfs pull)"
        ) from error


def _tensor_names(files: list[Path]) -> dict[str, Path]:
    """Every tensor of the checkpoint, and the file that holds it."""
    where: dict[str, Path] = {}
    for path in files:
        with _reading(path) as reader:
            found = set(reader.keys())
        twice = where.keys() & found
        if twice:
            raise InvalidCheckpointError(f"{path} repeats {_few(twice)} of another file; keep one copy of each tensor")
        where |= dict.fromkeys(found, path)
    return where


class _Part(NamedTuple):
    """A tensor of the checkpoint, and how many rows it has."""

    name: str
    rows: int


class _Fill(NamedTuple):
    """A parameter, and the tensors that it is made of, one below the other."""

    module: nn.Module
    parameter: str
    parts: list[_Part]


def _groups(model: Decoder) -> list[list[_Fill]]:
    """What to fill, in groups that are read together: the ends of the model, then each layer."""
    shape = model.config
    embedding = [_Part("model.embed_tokens.weight", shape.vocab_size)]
    ends = [_Fill(model, "norm", [_Part("model.norm.weight", shape.hidden_size)])]
    if shape.tie_word_embeddings:
        ends.append(_Fill(model.output, "weight", embedding))
    else:
        ends.append(_Fill(model, "embedding", embedding))
        ends.append(_Fill(model.output, "weight", [_Part("lm_head.weight", shape.vocab_size)]))
    return [ends, *(_layer(layer, f"model.layers.{i}.", shape) for i, layer in enumerate(model.layers))]


def _layer(layer: nn.Module, prefix: str, shape: ModelConfig) -> list[_Fill]:
    assert isinstance(layer, Layer)
    attention, feed_forward = layer.attention, layer.feed_forward
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    fills = [
        _Fill(layer, "attention_norm", [_Part(prefix + "input_layernorm.weight", hidden_size)]),
        _Fill(layer, "feed_forward_norm", [_Part(prefix + "post_attention_layernorm.weight", hidden_size)]),
    ]
    if attention.qk_norms is not None:
        for place, which in enumerate("qk"):
            name = f"{prefix}self_attn.{which}_norm.weight"
            fills.append(_Fill(attention.qk_norms, str(place), [_Part(name, shape.head_dim)]))
    heads = zip("qkv", attention.head_counts, strict=True)
    linears = [
        (attention.qkv_proj, [(f"self_attn.{which}_proj", n * shape.head_dim) for which, n in heads]),
        (attention.o_proj, [("self_attn.o_proj", hidden_size)]),
        (feed_forward.gate_up_proj, [("mlp.gate_proj", intermediate_size), ("mlp.up_proj", intermediate_size)]),
        (feed_forward.down_proj, [("mlp.down_proj", hidden_size)]),
    ]
    for linear, parts in linears:
        for kind in ("bias", "weight"):  # the weight last: with it the product is complete
            if getattr(linear, kind) is not None:
                fills.append(_Fill(linear, kind, [_Part(f"{prefix}{name}.{kind}", rows) for name, rows in parts]))
    return fills


def _fill(
    fill: _Fill, where: Mapping[str, Path], readers: Mapping[Path, Any], dtype: torch.dtype, device: str | torch.device
) -> None:
    """Give a parameter its memory and its values; pack it if that completes a product."""
    module, name, parts = fill
    shape = getattr(module, name).shape
    on_cpu = torch.device(device).type == "cpu"
    filled = large_memory.empty(shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=device)
    for part, destination in zip(parts, filled.split([part.rows for part in parts]), strict=True):
        _copy(readers[where[part.name]], part.name, destination, where[part.name])
    setattr(module, name, nn.Parameter(filled, requires_grad=False))
    if isinstance(module, Linear) and name == "weight":
        module.pack()


def _check_names(found: AbstractSet[str], wanted: Collection[str], config: ModelConfig, directory: Path) -> None:
    missing = set(wanted) - found
    # Old checkpoints store RoPE's frequencies, which follow from the config; tied ones may repeat the embedding.
    extra = {name for name in found - set(wanted) if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        extra.discard("lm_head.weight")
    if missing or extra:
        problems = " and ".join(
            f"{verb} {_few(names)}" for verb, names in (("lacks", missing), ("has unexpected", extra)) if names
        )
        raise InvalidCheckpointError(
            f"the checkpoint in {directory} {problems} for a {config.architecture} with {config.num_layers} layers; "
            "its weights and its config.json belong to different models, or it is not a plain causal language model"
        )


def _copy(reader: Any, name: str, destination: Tensor, path: Path) -> None:
    tensor = reader.get_tensor(name)
    if tensor.shape != destination.shape:
        raise InvalidCheckpointError(
            f"{name} in {path} has shape {list(tensor.shape)} but config.json implies {list(destination.shape)}; "
            "they belong to different models"
        )
    if tensor.dtype not in DTYPES:
        raise InvalidCheckpointError(
            f"{name} in {path} is {tensor.dtype}, as in a quantized model; use the unquantized checkpoint"
        )
    destination.copy_(tensor)


def _few(names: Collection[str]) -> str:
    """The first of `names`, and how many more there are."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


@contextmanager
def _explaining_memory(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: str | torch.device, kernels: Kernels
) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # On a CPU PyTorch has no class for this, only the allocator's words.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        needed = sum(parameter.nbytes for parameter in Decoder(config, dtype, "meta", kernels).parameters())
        raise OutOfMemoryError(
            f"the weights in {directory} need {needed / 2**30:.1f} GiB as {dtype}, more than {device} has free; use a "
            "narrower dtype, a smaller model or another device, or stop what else uses its memory"
        ) from error
