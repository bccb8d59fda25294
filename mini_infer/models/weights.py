"""Filling a decoder from the files of a checkpoint.

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
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError, OutOfMemoryError
from mini_infer.kernels import Kernels, large_memory
from mini_infer.models.checkpoint import Checkpoint, Stored
from mini_infer.models.config import ModelConfig
from mini_infer.models.decoder import Decoder
from mini_infer.models.families import FAMILIES, Names
from mini_infer.models.gguf import GgufModel, is_gguf, split_files
from mini_infer.models.linear import DENSE, Embedding, Format, Linear, Part, Read, Weighted
from mini_infer.models.quantization import Quantization, quantize
from mini_infer.models.rope import LongRope
from mini_infer.parallel.share import WHOLE, Share

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NOT_NEEDED = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")
"""Old checkpoints store RoPE's frequencies, which follow from the config; some of 8-bit floats, what a KV cache of such
would be scaled by."""

_ROWS_AT_ONCE = 4096
"""Of two large matrices that are compared."""


class Safetensors:
    """The safetensors files of a directory.

    Args:
        directory: where they are.
        quantization: how its config.json says that the matrices are written down; None is as plain numbers.
    """

    def __init__(self, directory: Path, quantization: Quantization | None) -> None:
        self.stored: Mapping[str, Stored] = _headers(weight_files(directory))
        self._quantization = quantization

    @contextmanager
    def reading(self, names: Collection[str]) -> Iterator[Read]:
        with ExitStack() as stack:
            paths = {self.stored[name].path for name in names}
            readers = {path: stack.enter_context(_reading(path)) for path in paths}

            def read(name: str, index: tuple[slice, ...] | None) -> Tensor:
                reader = readers[self.stored[name].path]
                tensor: Tensor = reader.get_tensor(name) if index is None else reader.get_slice(name)[index]
                return tensor

            yield read

    def format(self, matrix: str) -> Format:
        return DENSE if self._quantization is None else self._quantization.format(matrix, self.stored)


class _Fill(NamedTuple):
    """A module, the number of its layer ("" for the ends of the model), and the tensors that it is made of."""

    layer: str
    module: Weighted
    parts: Sequence[Part]


def load_model(
    directory: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: str | torch.device,
    kernels: Kernels,
    quantization: str | None = None,
    share: Share = WHOLE,
) -> Decoder:
    """Build the decoder that `config` describes and fill it from the files in `directory`.

    Where files and config contradict each other, the model is what transformers makes of them, or it is refused; see
    docs/compatibility.md.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and the files it names; with both, the
            index is ignored. Or a .gguf file.
        config: from `read_config`. A smaller max_position_embeddings saves rotary tables never used, and decides which
            of LongRoPE's two sets of frequencies holds.
        dtype: of all parameters; tensors are converted as they are read.
        device: where the parameters live.
        kernels: who computes.
        quantization: what becomes of matrices that are plain numbers: None, "int8" or "int4". It is done matrix by
            matrix, so there is never more than one of them in its original size.
        share: which part of the model to build; nothing else of the files is read.

    Raises:
        InvalidCheckpointError: a file or tensor is missing, unexpected, misshapen or unreadable.
        OutOfMemoryError: the device cannot hold the weights.
    """
    directory, device = Path(directory), torch.device(device)
    checkpoint: Checkpoint = GgufModel(directory) if is_gguf(directory) else Safetensors(directory, config.quantization)
    stored = checkpoint.stored
    if config.num_layers > len(stored):  # or building what cannot be filled would take its time
        raise InvalidCheckpointError(
            f"the checkpoint in {directory} has {len(stored)} tensors, too few for the {config.num_layers} layers of "
            "its config.json; they belong to different models"
        )
    names = FAMILIES[config.architecture].NAMES
    config, names = _untangle_embeddings(config, names, stored, dtype)
    _mention_longrope(config)
    with _explaining_memory(directory, config, dtype, device, kernels, share):
        model = Decoder(config, dtype, device, kernels, share)
        quantize(model, quantization, device.type, share.group)
        fills = _fills(model, names, checkpoint)
        all_fills = fills if share.is_whole else _fills(Decoder(config, dtype, "meta", kernels), names, checkpoint)
        _check(stored, [part for fill in all_fills for part in fill.parts], config, directory)
        for _, layer in groupby(fills, key=lambda fill: fill.layer):
            together = list(layer)
            with checkpoint.reading({part.name for fill in together for part in fill.parts}) as read:
                for fill in together:
                    fill.module.fill(fill.parts, read, device)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The files that make up the checkpoint in `directory`, or a GGUF file that is cut into several; all of them exist.

    Raises:
        InvalidCheckpointError: there are none, or one that the index names is missing.
    """
    if is_gguf(directory):
        return split_files(directory)
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


def _headers(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of the checkpoint."""
    stored: dict[str, Stored] = {}
    for path in files:
        with _reading(path) as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (it is no mapping)
            found = {name: Stored(name, path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        twice = stored.keys() & found.keys()
        if twice:
            raise InvalidCheckpointError(f"{path} repeats {_few(twice)} of another file; keep one copy of each tensor")
        stored |= found
    return stored


def _fills(model: Decoder, names: Names, checkpoint: Checkpoint) -> list[_Fill]:
    """What to do for each module of a model, given what the checkpoint calls it."""
    fills = []
    for path, module in model.named_modules():
        if isinstance(module, Weighted):
            place = path.split(".")[1] if path.startswith("layers.") else ""
            layer = place and str(model.span.start + int(place))
            called = [pattern.replace("*", layer) for pattern in names[path.replace(f".{place}.", ".*.", 1)]]
            if isinstance(module, Linear | Embedding):
                module.formats = [checkpoint.format(name) for name in called]
            parts = [part for part in module.parts(called) if not part.optional or part.name in checkpoint.stored]
            fills.append(_Fill(layer, module, parts))
    return fills


def _untangle_embeddings(
    config: ModelConfig, names: Names, stored: Mapping[str, Stored], dtype: torch.dtype
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


def _equal(one: Stored, other: Stored, dtype: torch.dtype) -> bool:
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


def _check(stored: Mapping[str, Stored], parts: Collection[Part], config: ModelConfig, directory: Path) -> None:
    """Refuse a checkpoint that is not made of exactly these tensors."""
    wanted = {part.name for part in parts}
    missing = wanted - stored.keys()
    # Tied checkpoints may repeat the embedding.
    extra = {name for name in stored.keys() - wanted if not name.endswith(_NOT_NEEDED)}
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
        if found.dtype not in part.dtypes:
            raise InvalidCheckpointError(
                f"{part.name} in {found.path} is {found.dtype}, but config.json implies "
                f"{' or '.join(sorted(part.dtypes))}; a quantised checkpoint needs its quantization_config there"
            )


def _few(names: Collection[str]) -> str:
    """The first of `names`, as far as anybody would read them, and how many more there are."""
    shown = ", ".join(name if len(name) <= 200 else f"{name[:200]}..." for name in sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


@contextmanager
def _explaining_memory(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels, share: Share
) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not large_memory.is_out_of_memory(error):
            raise
        needed = Decoder(config, dtype, "meta", kernels, share).weight_bytes
        raise OutOfMemoryError(
            f"the weights in {directory} need {needed / 2**30:.1f} GiB as {dtype}, more than {device} has free; use a "
            "narrower dtype, a smaller model or another device, or stop what else uses its memory"
        ) from error
