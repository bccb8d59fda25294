"""Weights as objects: what a checkpoint has to hold for a module, and what becomes of it.

`load_model` walks the modules of a model. Each one with weights of its own is `Weighted`: it names its `parts`, the
tensors of the checkpoint that it is made of; gets memory; is filled part by part; and is finished. So nobody but the
module knows that queries, keys and values lie in one matrix, or that a kernel wants its weight in another order.

A `Format` is how one matrix is written down: which tensors it takes, along which of their dimensions it may be cut, and
how it is multiplied. A quantised format would be one more class with these two methods. What is done to all matrices of
a model (quantise, cut into shards, add adapters) is a plain function that walks `model.modules()` in the same way,
before or after they are filled.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from mini_infer.kernels import Kernels, PackedLinear


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a format.

    Attributes:
        name: what follows the projection's name in a checkpoint.
        shape: there.
        outputs: the dimension that runs along the outputs; None if all outputs share the tensor.
        inputs: the dimension that runs along the inputs, likewise.
    """

    name: str
    shape: tuple[int, ...]
    outputs: int | None
    inputs: int | None

    def shard(self, along: Literal["outputs", "inputs"], rank: int, size: int) -> tuple[slice, ...]:
        """The index of the part that rank ``rank`` of ``size`` holds if a matrix is cut along its outputs or inputs.

        Raises:
            ValueError: the dimension is no multiple of ``size``.
        """
        cut = self.outputs if along == "outputs" else self.inputs
        index = [slice(0, length) for length in self.shape]
        if cut is not None:
            each, rest = divmod(self.shape[cut], size)
            if rest:
                raise ValueError(f"{self.name} {self.shape}: {self.shape[cut]} {along} cannot be cut into {size}")
            index[cut] = slice(rank * each, (rank + 1) * each)
        return tuple(index)


class Format(Protocol):
    """How a matrix ``[outputs, inputs]``, and perhaps a bias, is written down and multiplied."""

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        """The tensors of one matrix."""

    def pack(self, tensors: Mapping[str, Tensor], kernels: Kernels) -> PackedLinear:
        """The product with the matrix, and its rows, from these tensors, which are not needed afterwards."""


class Dense:
    """Floating-point numbers, as they are."""

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        weight = TensorSpec("weight", (outputs, inputs), outputs=0, inputs=1)
        return (weight, TensorSpec("bias", (outputs,), outputs=0, inputs=None)) if bias else (weight,)

    def pack(self, tensors: Mapping[str, Tensor], kernels: Kernels) -> PackedLinear:
        return kernels.pack_linear(tensors["weight"], tensors.get("bias"))


DENSE = Dense()


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, and the place in a module's parameter that it is copied to.

    Attributes:
        name: in the checkpoint.
        shape: there.
        parameter: of the module.
        dim, start: it takes ``shape[dim]`` places of the parameter's dimension ``dim``, from ``start``.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    dim: int = 0
    start: int = 0


class Weighted(nn.Module):
    """A module with weights of its own. They have a shape and a dtype, but no memory until they are loaded.

    Attributes:
        weight: its one tensor; a module that is made of other parts overrides `parts`.
    """

    weight: nn.Parameter

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(shape, dtype)

    def parts(self, names: Sequence[str]) -> list[Part]:
        """What the checkpoint has to hold, given what it calls this module."""
        return [Part(f"{names[0]}.weight", tuple(self.weight.shape), "weight")]

    def finish(self) -> None:
        """All parts are there."""


class Norm(Weighted):
    """RMSNorm with a weight ``[size]``."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__((size,), dtype)
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same."""
        return self.kernels.rmsnorm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(the norm of ``x + residual``, that sum), in one pass over memory."""
        return self.kernels.add_rmsnorm(x, residual, self.weight, self.eps)


class Linear(Weighted):
    """x Wᵀ + b, where W may be several matrices of the checkpoint, one below the other.

    Args:
        inputs: features of x.
        outputs: rows of each of the matrices.
        bias: they have biases.
        dtype: of the parameters.
        kernels: who multiplies.
        format: how the matrices are written down.
    """

    def __init__(
        self,
        inputs: int,
        outputs: Sequence[int],
        bias: bool,
        dtype: torch.dtype,
        kernels: Kernels,
        format: Format = DENSE,
    ) -> None:
        nn.Module.__init__(self)
        self.kernels, self.format = kernels, format
        self.matrices = [format.tensors(rows, inputs, bias) for rows in outputs]
        for spec in format.tensors(sum(outputs), inputs, bias):
            self.register_parameter(spec.name, empty_parameter(spec.shape, dtype))

    def parts(self, names: Sequence[str]) -> list[Part]:
        parts = []
        start: Counter[str] = Counter()
        for name, specs in zip(names, self.matrices, strict=True):
            for spec in specs:
                dim = spec.outputs or 0
                parts.append(Part(f"{name}.{spec.name}", spec.shape, spec.name, dim, start[spec.name]))
                start[spec.name] += spec.shape[dim]
        return parts

    def finish(self) -> None:
        """Hand the tensors to the kernels, which may keep them in another order, and let go of them."""
        tensors = {name: parameter.data for name, parameter in self.named_parameters()}
        self._product = self.format.pack(tensors, self.kernels)
        for name in tensors:
            self.register_parameter(name, None)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, ``[N, inputs]``, for ids ``[N]``."""
        return self._product.rows(ids)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``, without a module's detour by way of its hooks."""
        return self._product(x)


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
