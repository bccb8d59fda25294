"""Weights as objects: what a checkpoint has to hold for a module, and what becomes of it.

`load_model` walks the modules of a model. Each one with weights of its own is `Weighted`: it names its `parts`, the
tensors of the checkpoint that it is made of; gets memory; is filled part by part; and is finished. So nobody but the
module knows that queries, keys and values lie in one matrix, or that a kernel wants its weight in another order.

A `Format` is how one matrix is written down: which tensors it takes, along which of their dimensions it may be cut, and
what matrix they are: plain numbers, or a `QuantizedMatrix`. What is done to all matrices of a model (quantise, cut into
shards, add adapters) is a plain function that walks `model.modules()` in the same way, before or after they are filled.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mini_infer.exceptions import UnsupportedModelError
from mini_infer.kernels import Kernels, PackedLinear, QuantizedMatrix, large_memory
from mini_infer.models.matrices import Matrix, Ordered, bytes_of, join

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Plain numbers, as safetensors and GGUF call them."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a format.

    Attributes:
        name: what follows the projection's name in a checkpoint.
        shape: there.
        outputs: the dimension that runs along the outputs; None if all outputs share the tensor.
        inputs: the dimension that runs along the inputs, likewise.
        dtypes: what it may be stored as, in safetensors' words or GGUF's.
        optional: a checkpoint may lack it.
    """

    name: str
    shape: tuple[int, ...]
    outputs: int | None
    inputs: int | None
    dtypes: frozenset[str] = FLOATS
    optional: bool = False

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
    """How a matrix ``[outputs, inputs]``, and perhaps a bias, is written down."""

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        """The tensors of one matrix."""

    def matrix(self, tensors: Mapping[str, Tensor]) -> Matrix:
        """The matrix that these tensors are."""


class Dense:
    """Floating-point numbers, as they are."""

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (outputs, inputs), outputs=0, inputs=1), *bias_spec(outputs, bias))

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"]


DENSE = Dense()


def bias_spec(outputs: int, bias: bool) -> tuple[TensorSpec, ...]:
    """A bias, if there is one: it is never quantised."""
    return (TensorSpec("bias", (outputs,), outputs=0, inputs=None),) if bias else ()


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, and the place in a module's parameter that it is copied to.

    Attributes:
        name: in the checkpoint.
        shape: there.
        parameter: of the module; "" if the module makes something of it first.
        dim, start: it takes ``shape[dim]`` places of the parameter's dimension ``dim``, from ``start``.
        dtypes, optional: see `TensorSpec`.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    dim: int = 0
    start: int = 0
    dtypes: frozenset[str] = FLOATS
    optional: bool = False


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

    def fill(self, parts: Sequence[Part], read: Callable[[str], Tensor], device: torch.device) -> None:
        """Give the parameters memory, and values from the checkpoint: what ``read`` gives for a part's name."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            self.register_parameter(name, _with_memory(parameter, device))
        for part in parts:
            place = getattr(self, part.parameter).narrow(part.dim, part.start, part.shape[part.dim])
            place.copy_(read(part.name))
        self.finish()

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
        dtype: of the parameters, of x and of the result.
        kernels: who multiplies.

    Attributes:
        formats: how each of the matrices is written down; set by whoever knows the checkpoint, before it is filled.
        scheme: makes few bits of the matrix if it has plain numbers; None leaves them as they are.
        bytes: what the matrix takes, once it is filled.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], bias: bool, dtype: torch.dtype, kernels: Kernels) -> None:
        nn.Module.__init__(self)
        self.inputs, self.outputs, self.bias_wanted, self.dtype, self.kernels = inputs, outputs, bias, dtype, kernels
        self.formats: Sequence[Format] = [DENSE] * len(outputs)
        self.scheme: Callable[[Tensor], QuantizedMatrix] | None = None
        for spec in DENSE.tensors(sum(outputs), inputs, bias):
            self.register_parameter(spec.name, empty_parameter(spec.shape, dtype))

    def parts(self, names: Sequence[str]) -> list[Part]:
        plain = all(format is DENSE for format in self.formats)
        parts = []
        start: Counter[str] = Counter()
        for name, format, rows in zip(names, self.formats, self.outputs, strict=True):
            for spec in format.tensors(rows, self.inputs, self.bias_wanted):
                dim, parameter = spec.outputs or 0, spec.name if plain else ""
                place = (dim, start[spec.name]) if plain else (0, 0)
                parts.append(Part(f"{name}.{spec.name}", spec.shape, parameter, *place, spec.dtypes, spec.optional))
                start[spec.name] += spec.shape[dim] if spec.shape else 0
        return parts

    def fill(self, parts: Sequence[Part], read: Callable[[str], Tensor], device: torch.device) -> None:
        if all(part.parameter for part in parts):
            return super().fill(parts, read, device)
        tensors: dict[str, dict[str, Tensor]] = {}
        for part in parts:  # those of one matrix share what stands before their last word
            matrix, _, name = part.name.rpartition(".")
            tensors.setdefault(matrix, {})[name] = read(part.name).to(device)
        biases = [some["bias"].to(self.dtype) for some in tensors.values() if "bias" in some]
        matrices = [format.matrix(some) for format, some in zip(self.formats, tensors.values(), strict=True)]
        self._pack(join(matrices, self.dtype), torch.cat(biases) if biases else None)

    def finish(self) -> None:
        self._pack(self.weight.data, getattr(self, "bias", None))

    def _pack(self, matrix: Matrix, bias: Tensor | None) -> None:
        """Hand the matrix to the kernels, which may keep it in another order, and let go of it."""
        if self.scheme is not None and isinstance(matrix, Tensor):
            matrix = self.scheme(matrix)
        self.bytes = bytes_of(matrix)
        self._product = _packed(matrix, bias, self.dtype, self.kernels)
        for name, _ in list(self.named_parameters()):
            self.register_parameter(name, None)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, ``[N, inputs]``, for ids ``[N]``."""
        return self._product.rows(ids)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``, without a module's detour by way of its hooks."""
        return self._product(x)


class Embedding(Weighted):
    """A matrix of which only rows are looked up.

    Attributes:
        formats: how it is written down, one of them.
        bytes: what it takes.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.dtype = dtype
        self.formats: Sequence[Format] = [DENSE]
        self.bytes = self.weight.nbytes
        self._matrix: QuantizedMatrix | None = None

    def parts(self, names: Sequence[str]) -> list[Part]:
        outputs, inputs = self.weight.shape
        parameter = "weight" if self.formats[0] is DENSE else ""
        specs = self.formats[0].tensors(outputs, inputs, False)
        return [Part(f"{names[0]}.{s.name}", s.shape, parameter, dtypes=s.dtypes, optional=s.optional) for s in specs]

    def fill(self, parts: Sequence[Part], read: Callable[[str], Tensor], device: torch.device) -> None:
        if all(part.parameter for part in parts):
            return super().fill(parts, read, device)
        tensors = {part.name.rpartition(".")[2]: read(part.name).to(device) for part in parts}
        matrix = self.formats[0].matrix(tensors)
        self.bytes = bytes_of(matrix)
        if isinstance(matrix, Tensor):
            self.weight = nn.Parameter(matrix.to(self.dtype), requires_grad=False)
        else:
            if isinstance(matrix, Ordered):
                raise UnsupportedModelError(f"{parts[0].name}: an embedding with its inputs reordered is not supported")
            self._matrix = matrix
            self.register_parameter("weight", None)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, ``[N, inputs]``, for ids ``[N]``."""
        if self._matrix is not None:
            return self._matrix.rows(ids).dequantize(self.dtype)
        return functional.embedding(ids, self.weight)


def _packed(matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, kernels: Kernels) -> PackedLinear:
    """The product with a matrix, and its rows."""
    if isinstance(matrix, Tensor):
        return kernels.pack_linear(matrix, bias)
    if isinstance(matrix, QuantizedMatrix):
        return kernels.pack_quantized(matrix, bias, dtype)
    inner = kernels.pack_quantized(matrix.matrix, bias, dtype)
    order, places = matrix.order, matrix.order.argsort()
    return replace(
        inner,
        multiply=lambda x: inner.multiply(x.index_select(-1, order)),
        rows=lambda ids: inner.rows(ids).index_select(-1, places),
    )


def _with_memory(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    empty = large_memory.empty if device.type == "cpu" else partial(torch.empty, device=device)
    return nn.Parameter(empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
