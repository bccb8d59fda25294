"""What `pack_linear` and `pack_quantized` make of a weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_infer.kernels.checks import check


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight that was prepared: call it with x `[..., in_features]` for x Wᵀ + b, `[..., out_features]`.

    Attributes:
        multiply: x to x Wᵀ + b, unchecked.
        rows: ids `[N]` to those rows of the weight, `[N, in_features]`; an embedding that is tied to the output layer
            needs no second copy.

    Raises:
        KernelError: x has another dtype, device or number of features.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    multiply: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        fits = isinstance(x, Tensor) and x.dtype is self.dtype and x.device == self.device
        if not fits or x.shape[-1:] != (self.in_features,):
            check("linear", "x", x, (..., self.in_features), dtypes={self.dtype}, device=self.device)
        return self.multiply(x)
