"""Quantised weights: how checkpoints on the Hub write them down, and how plain ones are quantised while they load.

- `config`: what ``quantization_config`` in config.json says, and so which `Format` each matrix has;
- `compressed`, `gptq`, `awq`, `fp8`: those formats, each to a `QuantizedMatrix` with exactly the values that it stands
  for;
- `schemes`: int8 and int4 from plain numbers.
"""

from mini_infer.models.quantization.config import Quantization, read_quantization
from mini_infer.models.quantization.schemes import SCHEMES, quantize

__all__ = ["SCHEMES", "Quantization", "quantize", "read_quantization"]
