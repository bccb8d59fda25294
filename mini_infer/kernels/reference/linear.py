"""Matrix products with a weight that is used again and again."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import embedding, linear

from mini_infer.kernels.registry import REFERENCE, register


@register("pack_linear", backend=REFERENCE)
def pack_linear(weight: Tensor, bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return partial(linear, weight=weight, bias=bias), partial(embedding, weight=weight)
