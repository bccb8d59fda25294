"""Weights as objects: what a checkpoint has to hold for a module, and what becomes of it.

`load_model` walks the modules of a model. Each one with weights of its own is `Weighted`: it names its `parts`, the
tensors of the checkpoint that it is made of; gets memory; is filled part by part; and is finished. So nobody but the
module knows that queries, keys and values lie in one matrix, or that a kernel wants its weight in another order.

A `Format` is how one matrix is written down: which tensors it takes, along which of their dimensions they may be cut
and at which places, and what matrix they are: plain numbers, or a `QuantizedMatrix`. Of a matrix that is cut, a rank
reads what lies between the nearest such places around its share. What is done to all matrices of a model (quantise, cut
into shards, add adapters) is a plain function that walks `model.modules()` in the same way, before or after they are
filled.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from mini_infer.exceptions import UnsupportedModelError
from mini_infer.kernels import Kernels, PackedLinear, QuantizedMatrix, large_memory
from mini_infer.models.matrices import Matrix, Ordered, bytes_of, cut, join
from mini_infer.parallel.slices import Span, whole

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
        step: for how many outputs, and how many inputs, one place of it is: those of a word of codes, or of a scale.
    """

    name: str
    shape: tuple[int, ...]
    outputs: int | None
    inputs: int | None
    dtypes: frozenset[str] = FLOATS
    optional: bool = False
    step: tuple[int, int] = (1, 1)

    def cut(self, outputs: Span, inputs: Span) -> tuple[slice, ...]:
        """The index of what some of the outputs need, and of the inputs; places that others need, too, included."""
        slices = {self.outputs: outputs.steps(self.step[0]), self.inputs: inputs.steps(self.step[1])}
        return tuple(slices.get(dim, slice(0, length)) for dim, length in enumerate(self.shape))


def cover(specs: Sequence[TensorSpec], outputs: Span, inputs: Span) -> tuple[Span, Span]:
    """What to read of a matrix, given which part of it is wanted: no more than that, up to where no word of codes and
    no scale is cut apart."""
    return (
        outputs.cover(math.lcm(*(spec.step[0] for spec in specs if spec.outputs is not None))),
        inputs.cover(math.lcm(*(spec.step[1] for spec in specs if spec.inputs is not None))),
    )


class Format(Protocol):
    """How a matrix ``[outputs, inputs]``, and perhaps a bias, is written down."""

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        """The tensors of one matrix."""

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> Matrix:
        """The matrix that these tensors are, or these outputs and inputs of it; the tensors are cut there, and the
        spans as `cover` gives them."""


class Dense:
    """Floating-point numbers, as they are."""

    def tensors(self, outputs: int, inputs: int, bias: bool) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (outputs, inputs), outputs=0, inputs=1), *bias_spec(outputs, bias))

    def matrix(self, tensors: Mapping[str, Tensor], outputs: Span, inputs: Span) -> Tensor:
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
        dim, start: where it begins along the parameter's dimension ``dim``; it fills the others.
        dtypes, optional: see `TensorSpec`.
        index: the part of it that is copied; None is all.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    dim: int = 0
    start: int = 0
    dtypes: frozenset[str] = FLOATS
    optional: bool = False
    index: tuple[slice, ...] | None = None

    @property
    def length(self) -> int:
        """Places that it takes along ``dim``."""
        return self.shape[self.dim] if self.index is None else self.index[self.dim].stop - self.index[self.dim].start


Read: TypeAlias = Callable[[str, tuple[slice, ...] | None], Tensor]
"""Gives a tensor of the checkpoint by its name, or of it what an index says, without reading more."""


class Weighted(nn.Module):
    """A module with weights of its own. They have a shape and a dtype, but no memory until they are loaded.

    Attributes:
        weight: its one tensor; a module that is made of other parts overrides `parts`.

    Args:
        rows: of that tensor, which of the checkpoint's it has.
        shape: of each of them.
        dtype: of the tensor.
    """

    weight: nn.Parameter

    def __init__(self, rows: Span, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.span = rows
        self.weight = empty_parameter((len(rows), *shape), dtype)

    def parts(self, names: Sequence[str]) -> list[Part]:
        """What the checkpoint has to hold, given what it calls this module."""
        shape = (self.span.total, *self.weight.shape[1:])
        index = None if self.span.is_whole else (self.span.of(shape[0]), *(slice(0, n) for n in shape[1:]))
        return [Part(f"{names[0]}.weight", shape, "weight", index=index)]

    def fill(self, parts: Sequence[Part], read: Read, device: torch.device) -> None:
        """Give the parameters memory, and values from the checkpoint: what ``read`` gives for its parts."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            self.register_parameter(name, _with_memory(parameter, device))
        for part in parts:
            place = getattr(self, part.parameter).narrow(part.dim, part.start, part.length)
            place.copy_(read(part.name, part.index))
        self.finish()

    def finish(self) -> None:
        """All parts are there."""


class Norm(Weighted):
    """RMSNorm with a weight of ``size``, or of a part of it, for whoever makes something of that."""

    def __init__(self, size: int | Span, eps: float, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__(_span(size), (), dtype)
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
        inputs: features of x; a span is those that x has, of all that the matrices have.
        outputs: rows of each of the matrices, likewise.
        bias: they have biases.
        dtype: of the parameters, of x and of the result.
        kernels: who multiplies.

    Attributes:
        formats: how each of the matrices is written down; set by whoever knows the checkpoint, before it is filled.
        scheme: makes few bits of the matrix if it has plain numbers; None leaves them as they are.
        scheme_step: how many inputs it looks at together; a part of them cannot be quantised alone.
        bytes: what the matrix takes, once it is filled.
    """

    def __init__(
        self,
        inputs: int | Span,
        outputs: Sequence[int | Span],
        bias: bool,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        nn.Module.__init__(self)
        self.inputs, self.outputs = _span(inputs), [_span(rows) for rows in outputs]
        self.bias_wanted, self.dtype, self.kernels = bias, dtype, kernels
        self.formats: Sequence[Format] = [DENSE] * len(outputs)
        self.scheme: Callable[[Tensor], QuantizedMatrix] | None = None
        self.scheme_step = 1
        for spec in DENSE.tensors(sum(map(len, self.outputs)), len(self.inputs), bias):
            self.register_parameter(spec.name, empty_parameter(spec.shape, dtype))

    def parts(self, names: Sequence[str]) -> list[Part]:
        plain = all(format is DENSE for format in self.formats) and not self._is_coded_before_it_is_cut
        parts = []
        start: Counter[str] = Counter()
        for name, format, rows in zip(names, self.formats, self.outputs, strict=True):
            specs, *spans = self._to_read(format, rows)
            for spec in specs:
                dim, parameter = spec.outputs or 0, spec.name if plain else ""
                place = (dim, start[spec.name]) if plain else (0, 0)
                full = f"{name}.{spec.name}"
                part = Part(full, spec.shape, parameter, *place, spec.dtypes, spec.optional, _index(spec, *spans))
                parts.append(part)
                start[spec.name] += part.length if plain else 0
        return parts

    @property
    def _is_coded_before_it_is_cut(self) -> bool:
        return self.scheme is not None and self.inputs.cover(self.scheme_step) != self.inputs

    def _to_read(self, format: Format, rows: Span) -> tuple[tuple[TensorSpec, ...], Span, Span]:
        """The tensors of one of the matrices, and the outputs and inputs to read of it."""
        specs = format.tensors(rows.total, self.inputs.total, self.bias_wanted)
        inputs = self.inputs.cover(self.scheme_step) if self._is_coded_before_it_is_cut else self.inputs
        return specs, *cover(specs, rows, inputs)

    def fill(self, parts: Sequence[Part], read: Read, device: torch.device) -> None:
        if all(part.parameter for part in parts):
            if len(parts) > 1 or self.kernels.backend_of("pack_linear") != "cpu":
                return super().fill(parts, read, device)
            return self._pack(read(parts[0].name, parts[0].index).to(self.dtype), None)  # right out of the file
        tensors: dict[str, dict[str, Tensor]] = {}
        for part in parts:  # those of one matrix share what stands before their last word
            matrix, _, name = part.name.rpartition(".")
            tensors.setdefault(matrix, {})[name] = read(part.name, part.index).to(device)
        matrices, biases = [], []
        for format, some, rows in zip(self.formats, tensors.values(), self.outputs, strict=True):
            _, outputs, inputs = self._to_read(format, rows)
            found = format.matrix(some, outputs, inputs)
            if self.scheme is not None and isinstance(found, Tensor) and self._is_coded_before_it_is_cut:
                found = self.scheme(found.to(self.dtype))
            elif not isinstance(found, Tensor) and not self.inputs.is_whole:
                self.scheme = None  # it has its file's codes, or plain numbers that a cut has made of them
            mine = rows.within(outputs)
            matrices.append(cut(found, mine, self.inputs.within(inputs), self.dtype))
            if "bias" in some:
                biases.append(some["bias"][mine.start : mine.stop].to(self.dtype))
        if self._is_coded_before_it_is_cut:
            self.scheme = None  # as above
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

    Args:
        rows: which of the checkpoint's it has.
        inputs: numbers in each.
        dtype: of them.

    Attributes:
        formats: how it is written down, one of them.
        bytes: what it takes.
    """

    def __init__(self, rows: Span, inputs: int, dtype: torch.dtype) -> None:
        super().__init__(rows, (inputs,), dtype)
        self.dtype, self.num_inputs = dtype, inputs
        self.formats: Sequence[Format] = [DENSE]
        self.bytes = self.weight.nbytes
        self._matrix: QuantizedMatrix | None = None

    def parts(self, names: Sequence[str]) -> list[Part]:
        parameter = "weight" if self.formats[0] is DENSE else ""
        specs, *spans = self._to_read()
        return [
            Part(
                f"{names[0]}.{spec.name}", spec.shape, parameter, 0, 0, spec.dtypes, spec.optional, _index(spec, *spans)
            )
            for spec in specs
        ]

    def _to_read(self) -> tuple[tuple[TensorSpec, ...], Span, Span]:
        specs = self.formats[0].tensors(self.span.total, self.num_inputs, False)
        return specs, *cover(specs, self.span, whole(self.num_inputs))

    def fill(self, parts: Sequence[Part], read: Read, device: torch.device) -> None:
        if all(part.parameter for part in parts):
            return super().fill(parts, read, device)
        tensors = {part.name.rpartition(".")[2]: read(part.name, part.index).to(device) for part in parts}
        _, outputs, inputs = self._to_read()
        matrix = cut(self.formats[0].matrix(tensors, outputs, inputs), self.span.within(outputs), inputs, self.dtype)
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


def _index(spec: TensorSpec, outputs: Span, inputs: Span) -> tuple[slice, ...] | None:
    """What to read of a tensor; None is all of it."""
    index = spec.cut(outputs, inputs)
    everything = tuple(slice(0, length) for length in spec.shape)
    return None if index == everything or (outputs.is_whole and inputs.is_whole) else index


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


def _span(places: int | Span) -> Span:
    return whole(places) if isinstance(places, int) else places


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
