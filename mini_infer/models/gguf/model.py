"""A GGUF checkpoint, in the words of one on the Hub: config.json's fields, and tensors by the names that families use.

llama.cpp turns neighbouring features of a head together where everybody else turns those half a head apart, so the rows
of a Llama's queries and keys lie in another order in the file. Rows are whole, however quantised, so putting them back
costs one copy.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError, ModelNotFoundError, UnsupportedModelError
from mini_infer.kernels import QuantizedMatrix
from mini_infer.models.checkpoint import Stored
from mini_infer.models.gguf.blocks import DENSE_TYPES, LAYOUTS, read_blocks
from mini_infer.models.gguf.file import GgufFile, split_files
from mini_infer.models.linear import DENSE, Format, Read, TensorSpec, bias_spec
from mini_infer.parallel.slices import Span


class _Architecture(NamedTuple):
    """What llama.cpp calls a family, in that of transformers, and where its files differ."""

    hf: str
    model_type: str
    pairs_are_neighbours: bool = False
    norms: Mapping[str, str] = {}


_OLMO2_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}

ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("LlamaForCausalLM", "llama", pairs_are_neighbours=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3"),
    "smollm3": _Architecture("SmolLM3ForCausalLM", "smollm3", pairs_are_neighbours=True),
    "olmo2": _Architecture("Olmo2ForCausalLM", "olmo2", norms=_OLMO2_NORMS),
}
"""By general.architecture. Mistral's files say that they are llama."""

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Blocks:
    """Blocks of one type: a `Format`."""

    type: str

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        elements, _ = LAYOUTS[self.type]
        weight = TensorSpec("weight", (outputs, inputs), 0, 1, frozenset({self.type}), step=(1, elements))
        return (weight, *bias_spec(outputs, bias))

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> QuantizedMatrix:
        return read_blocks(self.type, tensors["weight"])


class GgufModel:
    """The files of one checkpoint.

    Args:
        path: the file, or any of those that it is cut into.

    Attributes:
        fields: what its config.json would say.
        tensors: by the names that they have on the Hub, each one's file and its name there.
        stored: the same, as all checkpoints say it.

    Raises:
        ModelNotFoundError: there is no such file.
        InvalidCheckpointError: a file or a key is missing, damaged or contradicts another.
        UnsupportedModelError: an architecture or an option that is not implemented.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelNotFoundError(f"{path} does not exist")
        self.path = path
        files = [GgufFile(part) for part in split_files(path)]
        self.metadata = files[0].metadata
        name = self.metadata.get("general.architecture")
        known = ARCHITECTURES.get(name) if isinstance(name, str) else None
        if known is None:
            raise UnsupportedModelError(
                f"{path}: architecture {_short(name)} is not supported; supported are {', '.join(ARCHITECTURES)}"
            )
        self._name, self._architecture = str(name), known
        self.tensors: dict[str, tuple[GgufFile, str]] = {}
        self._rope_factors: tuple[float, ...] | None = None
        for file in files:
            for tensor in file.tensors:
                if tensor == _ROPE_FACTORS:
                    self._rope_factors = tuple(file.floats(tensor).double().flatten().tolist())
                    continue
                on_the_hub = self._on_the_hub(tensor)
                if on_the_hub in self.tensors:
                    raise InvalidCheckpointError(f"{file.path} repeats {tensor} of another file")
                self.tensors[on_the_hub] = file, tensor
        self.stored = {
            name: Stored(name, file.path, file.tensors[there].shape, file.tensors[there].type)
            for name, (file, there) in self.tensors.items()
        }
        self._num_heads, self._num_kv_heads = self._heads()
        self.fields = self._fields()

    @contextmanager
    def reading(self, names: Collection[str]) -> Iterator[Read]:
        yield self.read  # the files are mapped

    def format(self, matrix: str) -> Format:
        stored = self.stored.get(f"{matrix}.weight")
        return DENSE if stored is None or stored.dtype in DENSE_TYPES else Blocks(stored.dtype)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor by its name on the Hub: as it is, or in blocks, uint8 ``[N, bytes of a row]``; a view of the file
        where its rows need not move.

        Args:
            index: what to read of it; columns are counted in blocks. None is all.
        """
        file, stored = self.tensors[name]
        kind = file.tensors[stored].type
        is_dense = kind in DENSE_TYPES
        tensor = file.floats(stored) if is_dense else file.bytes_of(stored)
        if index is None:
            index = tuple(slice(0, length) for length in tensor.shape)
        elif not is_dense:
            (rows, blocks), (_, size) = index, LAYOUTS[kind]
            index = rows, slice(blocks.start * size, blocks.stop * size)
        if self._architecture.pairs_are_neighbours:
            for what, heads in (("q_proj.", self._num_heads), ("k_proj.", self._num_kv_heads)):
                if what in name:
                    order = torch.arange(len(tensor)).view(heads, -1, 2).transpose(1, 2).flatten()
                    return tensor[order[index[0]]][(slice(None), *index[1:])]
        return tensor[index]

    def _on_the_hub(self, name: str) -> str:
        """What a tensor would be called there; itself if it is one that no family has."""
        match = re.fullmatch(r"(?:blk\.(\d{1,4})\.)?(\w+)\.(weight|bias)", name)
        if match is None:
            return name
        layer, part, kind = match.groups()
        known = (_ENDS if layer is None else {**_LAYER, **self._architecture.norms}).get(part)
        if known is None:
            return name
        return f"{known}.{kind}" if layer is None else f"model.layers.{int(layer)}.{known}.{kind}"

    # ---- config.json ---------------------------------------------------------------------------------------------

    def _fields(self) -> dict[str, Any]:
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise InvalidCheckpointError(f"{self.path} has no token_embd.weight; it is no language model")
        head_dim = self._integer("attention.key_length", None)
        if head_dim is None:
            head_dim = self._integer("embedding_length") // self._num_heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._integer(key, head_dim) != head_dim:
                raise UnsupportedModelError(
                    f"{self.path}: {self._name}.{key} must be {head_dim}, the width of a head; got {self._integer(key)}"
                )
        for key in ("expert_count", "attention.sliding_window"):
            if self._integer(key, 0):
                raise UnsupportedModelError(
                    f"{self.path}: {self._name}.{key} is not supported; got {self._integer(key)}"
                )
        context = self._integer("context_length")
        return {
            "architectures": [self._architecture.hf],
            "model_type": self._architecture.model_type,
            "vocab_size": embedding[0].tensors[embedding[1]].shape[0],
            "hidden_size": self._integer("embedding_length"),
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": self._num_heads,
            "num_key_value_heads": self._num_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": context,
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(context),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self.tensors,
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "use_sliding_window": False,
            "hidden_act": "silu",
            "dtype": self._dtype(),
        }

    def _dtype(self) -> str:
        """What to compute in: a file of one type of floating point says it, and blocks are fine in bfloat16."""
        types = {file.tensors[name].type for file, name in self.tensors.values() if len(file.tensors[name].shape) > 1}
        return {"F32": "float32", "F16": "float16"}.get(types.pop(), "bfloat16") if len(types) == 1 else "bfloat16"

    def _heads(self) -> tuple[int, int]:
        heads = self._integer("attention.head_count")
        kv_heads = self._integer("attention.head_count_kv", heads)
        if not 1 <= kv_heads <= heads <= 1 << 16:
            raise InvalidCheckpointError(f"{self.path} has {heads} heads and {kv_heads} key-value heads")
        for what, count in (("q_proj", heads), ("k_proj", kv_heads)):
            for name, (file, stored) in self.tensors.items():
                if f"{what}." in name and file.tensors[stored].shape[0] % (2 * count):
                    raise InvalidCheckpointError(f"{file.path}: {stored} cannot be cut into {count} heads of pairs")
        return heads, kv_heads

    def _rope_scaling(self, context: int) -> dict[str, Any] | None:
        if self._rope_factors is not None:  # Llama 3's: what its formula gives was worked out when the file was made
            if not all(math.isfinite(factor) and factor > 0 for factor in self._rope_factors):
                raise InvalidCheckpointError(f"{self.path}: {_ROPE_FACTORS} must be positive")
            return {
                "rope_type": "longrope",
                "short_factor": list(self._rope_factors),
                "long_factor": list(self._rope_factors),
                "attention_factor": 1.0,
                "factor": 1.0,
                "original_max_position_embeddings": context,
            }
        kind = self.metadata.get(f"{self._name}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise UnsupportedModelError(
                f"{self.path}: {self._name}.rope.scaling.type may be none, linear or yarn; got {_short(kind)}"
            )
        scaling: dict[str, Any] = {"rope_type": kind, "factor": self._number("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._integer("rope.scaling.original_context_length")
        return scaling

    def _integer(self, key: str, *default: Any) -> Any:
        value = self._key(key, *default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one for each layer, all the same
        if (not default and (type(value) is not int or value < 1)) or (type(value) is not int and value is not None):
            raise InvalidCheckpointError(
                f"{self.path}: {self._name}.{key} must be a positive integer; got {_short(value)}"
            )
        return value

    def _number(self, key: str, *default: float) -> float:
        value = self._key(key, *default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InvalidCheckpointError(f"{self.path}: {self._name}.{key} must be a number; got {_short(value)}")
        return float(str(np.float32(value)))  # 1e-05, as config.json had it, and not the float32 next to that

    def _key(self, key: str, *default: Any) -> Any:
        full = f"{self._name}.{key}"
        if full not in self.metadata and not default:
            raise InvalidCheckpointError(f"{self.path} has no {full}")
        return self.metadata.get(full, *default)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
