"""Matrix products with a weight that is used again and again."""

import functools
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from mini_infer.kernels.registry import REFERENCE, register


@register("pack_linear", backend=REFERENCE)
def pack_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return functools.partial(linear, weight=weight, bias=bias)
