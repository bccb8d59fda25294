"""Products by oneDNN, the library for neural networks that PyTorch brings along; the weight is in an order of its own.

PyTorch has the functions, but under private names; where they are missing, or do not do what they did, this candidate
is not there.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def is_there() -> bool:
    """Whether PyTorch has oneDNN under the names that are known here, and it multiplies as expected."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight, x = torch.eye(32, 64, dtype=torch.bfloat16), torch.ones(2, 64, dtype=torch.bfloat16)
    try:
        multiply, rows = pack(weight, None)
        return bool((multiply(x) == 1).all()) and torch.equal(rows(torch.tensor([3])), weight[3:4])
    except (AttributeError, RuntimeError, TypeError):
        return False


def pack(weight: Tensor, bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The product with a weight ``[N, K]`` of bfloat16, and its rows, which it has to be unpacked for."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return functools.partial(_multiply, packed, bias), functools.partial(_rows, packed)


def _multiply(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return out.view(*x.shape[:-1], out.shape[-1])


def _rows(packed: Tensor, ids: Tensor) -> Tensor:
    return packed.to_dense()[ids]
