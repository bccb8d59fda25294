"""Writing a quantised checkpoint, in compressed-tensors' format, which vLLM reads, too.

Tensors are read, quantised and written one after the other; never more than one file of the result is in memory.
"""

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.kernels import QuantizedMatrix
from mini_infer.models.families import FAMILIES, read_config
from mini_infer.models.gguf import is_gguf
from mini_infer.models.hf_config import read_json
from mini_infer.models.quantization.schemes import INT4_GROUP, SCHEMES
from mini_infer.models.weights import INDEX_FILE, SINGLE_FILE, Safetensors

FILE_BYTES = 2**30
"""Tensors are written in files of about this size."""

_WEIGHTS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "int4": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": INT4_GROUP,
        "dynamic": False,
    },
}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def quantize_checkpoint(source: Path, target: Path, scheme: str) -> None:
    """Quantise the projections of all layers; all else is as it was, the output projection too.

    Args:
        source: a directory with safetensors files of plain numbers.
        target: a directory that is not there yet, or is empty.
        scheme: "int8" or "int4".

    Raises:
        UnsupportedModelError: the checkpoint is quantised already.
        InvalidCheckpointError: it cannot be read, or there is something at ``target``.
    """
    if is_gguf(source):
        raise UnsupportedModelError(f"{source} is quantised already; start from the original checkpoint")
    config, fields = read_config(source), read_json(source / "config.json")
    if config.quantization is not None:
        raise UnsupportedModelError(
            f"{source} is quantised already ({config.quantization.method}); start from the original"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidCheckpointError(f"{target} exists; choose another place for the result")
    checkpoint = Safetensors(source, None)
    patterns = [name for path, names in FAMILIES[config.architecture].NAMES.items() if "proj" in path for name in names]
    matrices = {p.replace("*", str(layer)) for p in patterns for layer in range(config.num_layers)}
    target.mkdir(parents=True, exist_ok=True)
    _write(target, _tensors(checkpoint, matrices, scheme))
    (target / "config.json").write_text(
        json.dumps({**fields, "quantization_config": _config(scheme)}, indent=2) + "\n", encoding="utf-8"
    )
    for path in source.iterdir():
        copied = path.suffix in {".json", ".jinja", ".txt", ".model"} or path.name.startswith("chat_template")
        if path.is_file() and copied and path.name not in {"config.json", INDEX_FILE}:
            shutil.copy(path, target / path.name)


def _tensors(checkpoint: Safetensors, matrices: Collection[str], scheme: str) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(checkpoint.stored):
        matrix = name.removesuffix(".weight")
        with checkpoint.reading([name]) as read:
            tensor = read(name, None)
        if matrix not in matrices or not name.endswith(".weight"):
            yield name, tensor
            continue
        for part, value in _parts(SCHEMES[scheme](tensor)).items():
            yield f"{matrix}.{part}", value


def _parts(matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """What compressed-tensors stores of a matrix."""
    if matrix.codes.dtype is torch.int8:
        return {"weight": matrix.codes, "weight_scale": matrix.scales}
    outputs, inputs = matrix.shape
    words = torch.nn.functional.pad(matrix.codes, (0, -matrix.codes.shape[1] % 4), value=0x88)  # of zeros
    return {
        "weight_packed": words.contiguous().view(torch.int32),
        "weight_scale": matrix.scales,
        "weight_shape": torch.tensor([outputs, inputs]),
    }


def _write(target: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors to as many files as it takes, and an index if that is more than one."""
    parts: list[Path] = []
    where: dict[str, int] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        path = target / f"part-{len(parts)}.safetensors"
        save_file(pending, path, {"format": "pt"})
        where.update(dict.fromkeys(pending, len(parts)))
        parts.append(path)
        pending.clear()

    for name, tensor in tensors:
        pending[name] = tensor.contiguous()
        if sum(value.nbytes for value in pending.values()) >= FILE_BYTES:
            flush()
    if pending:
        flush()
    if len(parts) == 1:
        parts[0].rename(target / SINGLE_FILE)
        return
    names = [f"model-{number + 1:05}-of-{len(parts):05}.safetensors" for number in range(len(parts))]
    for path, name in zip(parts, names, strict=True):
        path.rename(target / name)
    index = {"metadata": {}, "weight_map": {name: names[part] for name, part in where.items()}}
    (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _config(scheme: str) -> dict[str, Any]:
    format = "int-quantized" if scheme == "int8" else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": _WEIGHTS[scheme],
        "input_activations": _ACTIVATIONS if scheme == "int8" else None,
        "output_activations": None,
        "format": format,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
