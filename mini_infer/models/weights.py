"""Filling a decoder from safetensors files; the one place that knows how checkpoints name their tensors.

Each tensor is mapped from its file and copied straight to where it belongs, which may be a slice of a fused
parameter, changing dtype and device on the way. So loading needs the model's own memory plus one tensor's.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError, OutOfMemoryError
from mini_infer.models.config import DTYPES, ModelConfig
from mini_infer.models.decoder import Decoder, Layer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_model(directory: str | Path, config: ModelConfig, dtype: torch.dtype, device: str | torch.device) -> Decoder:
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
    names = _tensor_names(files)
    with _explaining_memory(directory, config, dtype, device):
        model = Decoder(config, dtype, device)
        destinations = _destinations(model)
        _check_names(names, destinations.keys(), config, directory)
        for path in files:
            with _reading(path) as reader:
                for name in reader.keys():  # noqa: SIM118  (a reader is no dictionary)
                    if name in destinations:
                        _copy(reader, name, destinations[name], path)
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


def _tensor_names(files: list[Path]) -> set[str]:
    names: set[str] = set()
    for path in files:
        with _reading(path) as reader:
            found = set(reader.keys())
        twice = names & found
        if twice:
            raise InvalidCheckpointError(f"{path} repeats {_few(twice)} of another file; keep one copy of each tensor")
        names |= found
    return names


def _destinations(model: Decoder) -> dict[str, Tensor]:
    """Where in the model each tensor of a checkpoint goes, as a view of a parameter."""
    destinations: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
    }
    if not model.config.tie_word_embeddings:
        destinations["lm_head.weight"] = model.output
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        attention, feed_forward = layer.attention, layer.feed_forward
        head_rows = [heads * attention.head_dim for heads in attention.head_counts]
        prefix = f"model.layers.{index}."
        destinations[prefix + "input_layernorm.weight"] = layer.attention_norm
        destinations[prefix + "post_attention_layernorm.weight"] = layer.feed_forward_norm
        if attention.qk_norms is not None:
            destinations[prefix + "self_attn.q_norm.weight"] = attention.qk_norms[0]
            destinations[prefix + "self_attn.k_norm.weight"] = attention.qk_norms[1]
        for kind in ("weight", "bias"):
            qkv, gate_up = getattr(attention.qkv_proj, kind), getattr(feed_forward.gate_up_proj, kind)
            o, down = getattr(attention.o_proj, kind), getattr(feed_forward.down_proj, kind)
            if qkv is not None:
                for name, rows in zip("qkv", qkv.split(head_rows), strict=True):
                    destinations[f"{prefix}self_attn.{name}_proj.{kind}"] = rows
            if o is not None:
                destinations[f"{prefix}self_attn.o_proj.{kind}"] = o
            if gate_up is not None:
                for name, rows in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                    destinations[f"{prefix}mlp.{name}_proj.{kind}"] = rows
            if down is not None:
                destinations[f"{prefix}mlp.down_proj.{kind}"] = down
    return destinations


def _check_names(found: set[str], wanted: Collection[str], config: ModelConfig, directory: Path) -> None:
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
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: str | torch.device
) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # On a CPU PyTorch has no class for this, only the allocator's words.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        needed = sum(parameter.nbytes for parameter in Decoder(config, dtype, "meta").parameters())
        raise OutOfMemoryError(
            f"the weights in {directory} need {needed / 2**30:.1f} GiB as {dtype}, more than {device} has free; use a "
            "narrower dtype, a smaller model or another device, or stop what else uses its memory"
        ) from error
