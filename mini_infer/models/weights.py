"""Filling a decoder from safetensors files.

Everything that can be wrong with the files shows in their headers, and is looked at before anything is built. Then the
modules are filled one after the other: each tensor is mapped from its file and copied straight to where it belongs,
which may be a slice of a fused parameter, changing dtype and device on the way; a complete weight is packed as the
kernels want it, and let go of. Files are mapped for one layer at a time. So loading needs the model's own memory plus
one layer's.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mini_infer.exceptions import InvalidCheckpointError, OutOfMemoryError
from mini_infer.kernels import Kernels, large_memory
from mini_infer.models.config import ModelConfig
from mini_infer.models.decoder import Decoder
from mini_infer.models.families import FAMILIES, Names
from mini_infer.models.linear import Part, Weighted
from mini_infer.models.rope import LongRope

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_STORED_DTYPES = {"F64", "F32", "F16", "BF16"}
_ROWS_AT_ONCE = 4096
"""Of two large matrices that are compared."""


class _Stored(NamedTuple):
    """A tensor of the checkpoint, as the header of its file has it."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str


class _Fill(NamedTuple):
    """A module, the number of its layer ("" for the ends of the model), and the tensors that it is made of."""

    layer: str
    module: Weighted
    parts: Sequence[Part]


def load_model(
    directory: str | Path, config: ModelConfig, dtype: torch.dtype, device: str | torch.device, kernels: Kernels
) -> Decoder:
    """Build the decoder that `config` describes and fill it from the safetensors files in `directory`.

    Where files and config contradict each other, the model is what transformers makes of them, or it is refused; see
    docs/compatibility.md.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and the files it names; with both, the
            index is ignored.
        config: from `read_config`. A smaller max_position_embeddings saves rotary tables never used, and decides which
            of LongRoPE's two sets of frequencies holds.
        dtype: of all parameters; tensors are converted as they are read.
        device: where the parameters live.
        kernels: who computes.

    Raises:
        InvalidCheckpointError: a file or tensor is missing, unexpected, misshapen or unreadable.
        OutOfMemoryError: the device cannot hold the weights.
    """
    directory, device = Path(directory), torch.device(device)
    stored = _headers(weight_files(directory))
    if config.num_layers > len(stored):  # or building what cannot be filled would take its time
        raise InvalidCheckpointError(
            f"the checkpoint in {directory} has {len(stored)} tensors, too few for the {config.num_layers} layers of "
            "its config.json; they belong to different models"
        )
    names = FAMILIES[config.architecture].NAMES
    config, names = _untangle_embeddings(config, names, stored, dtype)
    _mention_longrope(config)
    with _explaining_memory(directory, config, dtype, device, kernels):
        model = Decoder(config, dtype, device, kernels)
        fills = [
            _fill_of(path, module, names) for path, module in model.named_modules() if isinstance(module, Weighted)
        ]
        _check(stored, [part for fill in fills for part in fill.parts], config, directory)
        for _, layer in groupby(fills, key=lambda fill: fill.layer):
            together = list(layer)
            with ExitStack() as stack:
                needed = {stored[part.name].path for fill in together for part in fill.parts}
                readers = {path: stack.enter_context(_reading(path)) for path in needed}
                for fill in together:
                    _fill(fill, stored, readers, device)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `directory`; all of them exist.

    Raises:
        InvalidCheckpointError: there are none, or one that the index names is missing.
    """
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():  # as transformers does; an index beside it is of an older or a cut-up copy
        return [directory / SINGLE_FILE]
    if index.exists():
        files = [directory / name for name in _shard_names(index)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise InvalidCheckpointError(
                f"{directory} lacks {_few(missing)}, named by {INDEX_FILE}; the download is incomplete, fetch it again"
            )
        return files
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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


def _headers(files: Sequence[Path]) -> dict[str, _Stored]:
    """Every tensor of the checkpoint."""
    stored: dict[str, _Stored] = {}
    for path in files:
        with _reading(path) as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (it is no mapping)
            found = {name: _Stored(name, path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        twice = stored.keys() & found.keys()
        if twice:
            raise InvalidCheckpointError(f"{path} repeats {_few(twice)} of another file; keep one copy of each tensor")
        stored |= found
    return stored


def _fill_of(path: str, module: Weighted, names: Names) -> _Fill:
    """What to do for the module at ``path`` of the model, given what the checkpoint calls it."""
    layer = path.split(".")[1] if path.startswith("layers.") else ""
    patterns = names[path.replace(f".{layer}.", ".*.", 1)]
    return _Fill(layer, module, module.parts([pattern.replace("*", layer) for pattern in patterns]))


def _untangle_embeddings(
    config: ModelConfig, names: Names, stored: Mapping[str, _Stored], dtype: torch.dtype
) -> tuple[ModelConfig, Names]:
    """Config and names, so that they agree with the files about the output projection.

    A checkpoint whose config ties the output to the embedding may hold one of the two, or both. If both are there and
    differ once they have the model's dtype, both are used.
    """
    if not config.tie_word_embeddings:
        return config, names
    embedding, output = (f"{names[path][0]}.weight" for path in ("embedding", "output"))
    if embedding not in stored:
        return config, names  # what there is serves as both
    if output in stored and not _equal(stored[embedding], stored[output], dtype):
        logger.warning(
            "config.json says that %s is %s, but %s holds another one: using both, as transformers does; set "
            "tie_word_embeddings to false, or remove %s",
            output,
            embedding,
            stored[output].path,
            output,
        )
        return replace(config, tie_word_embeddings=False), names
    return config, {**names, "output": names["embedding"]}


def _equal(one: _Stored, other: _Stored, dtype: torch.dtype) -> bool:
    """Whether two matrices hold the same numbers once they are of this dtype."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    with _reading(one.path) as one_reader, _reading(other.path) as other_reader:
        slices = one_reader.get_slice(one.name), other_reader.get_slice(other.name)
        rows = (slice(start, start + _ROWS_AT_ONCE) for start in range(0, one.shape[0], _ROWS_AT_ONCE))
        return all(torch.equal(*(matrix[some].to(dtype) for matrix in slices)) for some in rows)


def _mention_longrope(config: ModelConfig) -> None:
    for rope in {layer.attention.rope for layer in config.layers}:
        if isinstance(rope, LongRope) and config.max_position_embeddings > rope.original_max_positions:
            logger.warning(
                "LongRoPE: all texts are read with the frequencies for long ones; those for short ones, which are "
                "better there, hold with max_model_len=%d or less",
                int(rope.original_max_positions),
            )


def _fill(fill: _Fill, stored: Mapping[str, _Stored], readers: Mapping[Path, Any], device: torch.device) -> None:
    """Give a module's parameters memory and values."""
    module = fill.module
    empty = large_memory.empty if device.type == "cpu" else partial(torch.empty, device=device)
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(empty(parameter.shape, dtype=parameter.dtype), requires_grad=False))
    for part in fill.parts:
        place = getattr(module, part.parameter).narrow(part.dim, part.start, part.shape[part.dim])
        _copy(readers[stored[part.name].path], part.name, place)
    module.finish()


def _copy(reader: Any, name: str, place: Tensor) -> None:
    place.copy_(reader.get_tensor(name))


def _check(stored: Mapping[str, _Stored], parts: Collection[Part], config: ModelConfig, directory: Path) -> None:
    """Refuse a checkpoint that is not made of exactly these tensors."""
    wanted = {part.name for part in parts}
    missing = wanted - stored.keys()
    # Old checkpoints store RoPE's frequencies, which follow from the config; tied ones may repeat the embedding.
    extra = {name for name in stored.keys() - wanted if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        extra.discard(f"{FAMILIES[config.architecture].NAMES['output'][0]}.weight")
    if missing or extra:
        problems = " and ".join(
            f"{verb} {_few(names)}" for verb, names in (("lacks", missing), ("has unexpected", extra)) if names
        )
        raise InvalidCheckpointError(
            f"the checkpoint in {directory} {problems} for a {config.architecture} with {config.num_layers} layers; "
            "its weights and its config.json belong to different models, or it is not a plain causal language model"
        )
    for part in parts:
        found = stored[part.name]
        if found.shape != part.shape:
            raise InvalidCheckpointError(
                f"{part.name} in {found.path} has shape {list(found.shape)} but config.json implies "
                f"{list(part.shape)}; they belong to different models"
            )
        if found.dtype not in _STORED_DTYPES:
            raise InvalidCheckpointError(
                f"{part.name} in {found.path} is {found.dtype}, as in a quantized model; use the unquantized checkpoint"
            )


def _few(names: Collection[str]) -> str:
    """The first of `names`, and how many more there are."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


@contextmanager
def _explaining_memory(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels
) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not large_memory.is_out_of_memory(error):
            raise
        needed = Decoder(config, dtype, "meta", kernels).weight_bytes
        raise OutOfMemoryError(
            f"the weights in {directory} need {needed / 2**30:.1f} GiB as {dtype}, more than {device} has free; use a "
            "narrower dtype, a smaller model or another device, or stop what else uses its memory"
        ) from error
