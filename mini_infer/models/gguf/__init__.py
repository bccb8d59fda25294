"""GGUF, llama.cpp's format: one file with config, tokenizer and weights, most often quantised.

- `file`: what the bytes say, and that they can be believed;
- `blocks`: from quantised blocks to a `QuantizedMatrix`;
- `model`: from llama.cpp's names to those of a checkpoint on the Hub, which is what `families` read;
- `vocabulary`: the tokenizer.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from mini_infer.models.gguf.file import GgufFile, is_gguf, split_files
from mini_infer.models.gguf.model import GgufModel
from mini_infer.models.gguf.vocabulary import read_tokenizer

__all__ = ["GgufFile", "GgufModel", "is_gguf", "read_tokenizer", "split_files"]
