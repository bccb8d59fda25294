"""Matrix products with weights that were rearranged once.

    y[m, n] = Σ_k x[m, k] * weight[n, k] + bias[n]

Several ways stand side by side. Those of this file read the same panels, so that each number of tokens can have its
own: "dot", "split" and "bfmmla" (see `tile`), and "amx". One more, "onednn", is what PyTorch brings along; it has an
order of its own, and a weight is held once, so it serves a weight for all numbers of tokens or for none. `choice` has
measured.

The weight is cut into panels of 64 output features (`COLUMNS`); within a panel the numbers lie in the order in which a
`tile` reads them, so that memory is read from front to back:

    weight [N, K]                     packed [N / 64, K / 2, 64, 2]  (pairs of bfloat16; float32 [N / 64, K, 64])
    ┌──────────────┐ 64 rows          panel 0: k = 0,1 of rows 0..63 │ k = 2,3 of rows 0..63 │ ...
    ├──────────────┤ = one panel      panel 1: ...
    └──────────────┘

A task is a run of panels times a few hundred tokens, six tokens at a time. A run is about 2 MiB long, since the
processor reads ahead only along a line and has to find its pace anew after each jump. A panel comes from memory for the
first six tokens and from the core's own cache for the others. These would leave memory idle, so meanwhile they ask for
the next panel. Two or three passes, a batch that memory and arithmetic hold back alike, go together: all multiply with
16 KiB of the panel, or 8 of a narrow one, which stay in the first cache, and ask for those after them.

Bytes: the weight, once. Floor: N * K * itemsize / memory bandwidth for a few tokens, 2 * M * N * K / peak for many. The
two meet at about a dozen tokens, which is why a small batch decodes for the price of one sequence.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels import large_memory
from mini_infer.kernels.cpu import amx, choice, onednn
from mini_infer.kernels.cpu.jit import (
    ELEMENTS,
    FIRST,
    Kernel,
    buffer,
    kernel,
    load,
    pointer,
    store,
    tasks,
)
from mini_infer.kernels.cpu.tile import COLUMNS, LINE, MATRICES, PAIRS, ROWS, VECTORS, tiles
from mini_infer.kernels.reference import linear as reference
from mini_infer.kernels.registry import register

TOKENS = 384
"""Tokens of one task at most, so that their x stays in the cache while panels are multiplied with it."""

RUN = 2 << 20
"""Bytes of weights that a task reads in one go, where that leaves at least two tasks for each thread."""

TOGETHER = 3
"""Passes that go through a panel side by side; more would not leave room for it in the core's first cache."""

BLOCK = 64 if COLUMNS == 64 else 128
"""How many k of a panel, or pairs of them, passes that go together multiply with before they go on."""

TILE = max(TOGETHER * ROWS, amx.ROWS) * COLUMNS

FAR = 8 << 10
"""How many bytes ahead a single pass asks for weights."""

SIZES = (1, 2, 4, 8, 16, 64, 256)
"""Numbers of tokens at which candidates are timed. Each serves up to the next one; the last all beyond."""

_TIMED = 1 << 18
"""Weights with fewer numbers take the first candidate; a trial would measure little but the call."""

_LONG = 1 << 31
"""Trials of more multiply-adds are left out."""

_TALL = 16
"""A matrix with more outputs than this many times its inputs is an output layer, whose rows may serve as embeddings."""


@register("pack_linear", backend="cpu", devices=["cpu"], priority=10)
def pack_linear(weight: Tensor, bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    pairs = weight.dtype is torch.bfloat16
    if weight.dtype not in ELEMENTS or 0 in weight.shape or (pairs and weight.shape[1] % 2):
        return reference.pack_linear(weight.clone(), bias)  # which keeps it, and it may be mapped from a file
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    names = candidates(weight)
    if len(names) == 1 or weight.numel() < _TIMED:
        return _in_panels(weight, bias, {1: names[0]})
    kinds = chosen(timed(weight, bias, names))
    return onednn.pack(weight, bias) if "onednn" in kinds.values() else _in_panels(weight, bias, kinds)


def chosen(found: choice.Times) -> dict[int, str]:
    """The way for each number of tokens: "onednn" for all if it is the best over all sizes, otherwise another each."""
    kinds = choice.fastest({name: row for name, row in found.items() if name != "onednn"})
    if "onednn" in found:
        ratios = [math.log(seconds / found[kinds[size]][size]) for size, seconds in found["onednn"].items()]
        if math.exp(sum(ratios) / len(ratios)) < choice.MARGIN:
            return dict.fromkeys(kinds, "onednn")
    return kinds


def candidates(weight: Tensor) -> list[str]:
    """The ways to multiply with a weight on this processor; the first is taken without a trial."""
    if weight.dtype is torch.float32:
        return ["fma"]
    num_outputs, num_inputs = weight.shape
    names = ["dot", "split"] if PAIRS else ["split"]
    if MATRICES and num_inputs % 4 == 0:
        names.append("bfmmla")
    if amx.is_there() and num_inputs % amx.DEPTH == 0:
        names.append("amx")
    if onednn.is_there() and num_outputs <= _TALL * num_inputs:
        names.append("onednn")
    return names


def timed(weight: Tensor, bias: Tensor | None, names: list[str], again: bool = False) -> choice.Times:
    """How long each candidate takes for a weight of this shape: what is known, or measured now."""
    num_outputs, num_inputs = weight.shape
    sizes = [size for size in SIZES if size * weight.numel() <= _LONG]
    key = f"pack_linear {num_inputs} to {num_outputs}"
    known = None if again else choice.times(key, names, sizes)
    return known or _measured(key, weight, bias, names, sizes)


@functools.cache
def fastest(names: tuple[str, ...], num_tokens: int) -> str:
    """Of these kinds of bfloat16, the one that multiplies so many tokens fastest, for whoever else is made of tiles."""
    key, weight = f"{num_tokens} tokens, 1024 to 1024", torch.ones(1024, 1024, dtype=torch.bfloat16)
    found = choice.times(key, names, [num_tokens]) or _measured(key, weight, None, names, [num_tokens])
    return choice.fastest(found)[num_tokens]


def _measured(
    key: str, weight: Tensor, bias: Tensor | None, names: Sequence[str], sizes: Sequence[int]
) -> choice.Times:
    num_outputs, num_inputs = weight.shape
    x = torch.randn(sizes[-1], num_inputs).to(weight.dtype)
    panels = _packed(weight)
    products: dict[str, Callable[[Tensor], Tensor]] = {
        name: _Product(panels, bias, num_inputs, num_outputs, name) for name in names if name != "onednn"
    }
    if "onednn" in names:
        products["onednn"] = onednn.pack(weight, bias)[0]
    runs = {name: functools.partial(_run_some, product, x) for name, product in products.items()}
    return choice.measure(key, runs, sizes)


def _run_some(product: Callable[[Tensor], Tensor], x: Tensor, num_tokens: int) -> Tensor:
    return product(x[:num_tokens])


def _in_panels(
    weight: Tensor, bias: Tensor | None, kinds: Mapping[int, str]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The product, by these kinds from so many tokens on, and the rows."""
    num_outputs, num_inputs = weight.shape
    panels = _packed(weight)
    products = {kind: _Product(panels, bias, num_inputs, num_outputs, kind) for kind in dict.fromkeys(kinds.values())}
    by_size = [(size, products[kind]) for size, kind in kinds.items()]
    multiply = by_size[0][1] if len(products) == 1 else functools.partial(_multiply, by_size, num_inputs)
    return multiply, functools.partial(_rows, panels, weight.shape)


def _multiply(by_size: Sequence[tuple[int, "_Product"]], num_inputs: int, x: Tensor) -> Tensor:
    num_tokens = x.numel() // num_inputs
    product = by_size[0][1]
    for size, following in by_size[1:]:
        if num_tokens < size:
            break
        product = following
    return product(x)


def _packed(weight: Tensor) -> Tensor:
    num_outputs, num_inputs = weight.shape
    num_panels = -(-num_outputs // COLUMNS)
    pairs = weight.dtype is torch.bfloat16
    panels = large_memory.empty(
        (num_panels, num_inputs // 2, COLUMNS, 2) if pairs else (num_panels, num_inputs, COLUMNS, 1), weight.dtype
    )
    # A float32 and a pair of bfloat16 are both moved as 32 bits.
    _pack(num_panels, weight.data_ptr(), panels.data_ptr(), num_outputs, panels.shape[1], work=weight.numel())
    return panels


def _rows(panels: Tensor, shape: torch.Size, ids: Tensor) -> Tensor:
    """Rows of the weight, gathered from the panels by a kernel of ours, which costs a recording nothing. What the
    weight has no row for is no number."""
    ids = ids.to(torch.int64).contiguous()
    rows = torch.empty((len(ids), shape[1]), dtype=panels.dtype)
    _gather(
        len(ids), ids.data_ptr(), panels.data_ptr(), rows.data_ptr(), shape[0], panels.shape[1], work=2 * rows.numel()
    )
    return rows


@kernel
def _gather(args):
    ids, panels = pointer(args[FIRST], np.int64), pointer(args[FIRST + 1], np.uint32)
    rows, num_outputs, depth = pointer(args[FIRST + 2], np.uint32), args[FIRST + 3], args[FIRST + 4]
    for task in tasks(args):
        row = ids[task]
        begin = row // COLUMNS * COLUMNS * depth + row % COLUMNS  # its column of its panel
        for k in range(depth):
            rows[task * depth + k] = panels[begin + k * COLUMNS] if 0 <= row < num_outputs else np.uint32(0x7FC07FC0)


class _Product:
    """x Wᵀ + b with W in panels. Four of these run per layer and step, so what never changes is looked up once."""

    def __init__(self, panels: Tensor, bias: Tensor | None, num_inputs: int, num_outputs: int, kind: str) -> None:
        self._panels, self._bias = panels, bias  # the addresses below are theirs
        self._num_inputs, self._num_outputs = num_inputs, num_outputs
        self._kernel, self._widens = _kernel(ELEMENTS[panels.dtype], kind), kind == "split"
        self._panels_at, self._bias_at = panels.data_ptr(), 0 if bias is None else bias.data_ptr()
        self._num_panels, self._depth, self._work = panels.shape[0], panels.shape[1], panels.numel()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self._num_inputs).contiguous()
        if self._widens:
            rows = _widened(rows)
        num_tokens = rows.shape[0]
        out = torch.empty((*x.shape[:-1], self._num_outputs), dtype=self._panels.dtype)
        num_chunks = -(-num_tokens // TOKENS)
        num_runs = min(self._num_panels, max(-(-self._panels.nbytes // RUN), 2 * torch.get_num_threads()))
        self._kernel(
            num_runs * num_chunks,
            rows.data_ptr(),
            self._panels_at,
            out.data_ptr(),
            self._bias_at,
            num_tokens,
            self._num_inputs,
            self._num_outputs,
            num_chunks,
            self._depth,
            self._num_panels,
            num_runs,
            work=self._work,
        )
        return out


def _widened(x: Tensor) -> Tensor:
    """bfloat16 as float32, by a kernel of ours, which can be recorded."""
    wide = torch.empty(x.shape, dtype=torch.float32)
    _widen_kernel(len(x), x.data_ptr(), wide.data_ptr(), x.shape[1], work=2 * x.numel())
    return wide


@kernel
def _widen_kernel(args):
    x, wide, width = pointer(args[FIRST], np.uint16), pointer(args[FIRST + 1], np.float32), args[FIRST + 2]
    for row in tasks(args):
        for i in range(row * width, (row + 1) * width):
            store(wide, i, load(x, i))


@kernel
def _pack(args):
    weight, panels = pointer(args[FIRST], np.uint32), pointer(args[FIRST + 1], np.uint32)
    num_outputs, depth = args[FIRST + 2], args[FIRST + 3]
    for panel in tasks(args):
        first, to = panel * COLUMNS, panel * COLUMNS * depth
        for begin in range(0, depth, 16):  # some of each row before the next row's, so that what is written is cached
            for row in range(COLUMNS):
                for k in range(begin, min(begin + 16, depth)):
                    at = to + k * COLUMNS + row
                    panels[at] = weight[(first + row) * depth + k] if first + row < num_outputs else np.uint32(0)


@functools.cache
def _kernel(element: type, kind: str) -> Kernel:
    with_amx = kind == "amx"
    most_rows = amx.ROWS if with_amx else ROWS
    x_bytes, x_step = (4 if kind in ("fma", "split") else 2), (8 if kind == "split" else 4)
    k_bytes = COLUMNS * 4  # of a panel at each k, or each pair of them
    lines = -(-k_bytes // (2 * LINE))  # a panel is fetched in two passes or more
    far = FAR if lines * LINE == k_bytes else 0  # or in a single one, where it is narrow

    @kernel
    def linear(args):
        x, panels, num_tokens, num_inputs = args[FIRST], args[FIRST + 1], args[FIRST + 4], args[FIRST + 5]
        out, num_outputs = pointer(args[FIRST + 2], element), args[FIRST + 6]
        bias, has_bias = pointer(args[FIRST + 3], element), args[FIRST + 3] != 0
        num_chunks, depth = args[FIRST + 7], args[FIRST + 8]
        num_panels, num_runs = args[FIRST + 9], args[FIRST + 10]
        x_stride = num_inputs * x_bytes
        sums_at, room = buffer(TILE), buffer(16)
        sums = pointer(sums_at, np.float32)
        configured = 0
        for task in tasks(args):
            run, chunk = task // num_chunks, task % num_chunks
            begin = num_tokens * chunk // num_chunks
            end = num_tokens * (chunk + 1) // num_chunks
            num_passes = (
                end - begin + most_rows - 1
            ) // most_rows  # of about as many rows each, rather than a small last one
            many = num_passes > 1
            # Each pass fetches its share of what follows. A single one of a wide panel, or of one token, need not: it
            # waits for memory anyway.
            ahead_stride = k_bytes // num_passes if many or (far > 0 and end - begin > 1) else 0
            together, num_parts = 1, 1
            if many and num_passes <= TOGETHER and not with_amx:
                together, num_parts = num_passes, -(-depth // BLOCK)
            part_depth = depth // num_parts // 2 * 2  # of all parts but the last; once, since a division takes long
            for panel in range(num_panels * run // num_runs, num_panels * (run + 1) // num_runs):
                w = panels + panel * depth * k_bytes
                column = panel * COLUMNS
                width = min(COLUMNS, num_outputs - column)
                for group in range(0, num_passes, together):
                    top, bottom = begin, end
                    if together < num_passes:
                        top = begin + (end - begin) * group // num_passes
                        bottom = begin + (end - begin) * (group + together) // num_passes
                    for part in range(num_parts):
                        k = part * part_depth
                        count = part_depth if part + 1 < num_parts else depth - k
                        w_at = w + k * k_bytes
                        for number in range(group, group + together):
                            first, last = top, bottom
                            if together > 1:
                                first = begin + (end - begin) * number // num_passes
                                last = begin + (end - begin) * (number + 1) // num_passes
                            x_at, to = x + first * x_stride + k * x_step, sums_at + (first - top) * COLUMNS * 4
                            ahead = w_at + (count * k_bytes * (num_passes + number) // num_passes if many else far)
                            if with_amx:
                                if last - first != configured:
                                    configured = last - first
                                    amx.configure(configured, room)
                                amx.product(last - first, x_at, x_stride, w, k_bytes, depth // 16, to, COLUMNS * 4)
                            elif part == 0:
                                tiles(
                                    kind, last - first, VECTORS, 0, lines, x_at, x_stride, w_at, k_bytes, count, to,
                                    COLUMNS * 4, ahead, ahead_stride,
                                )  # fmt: skip
                            else:
                                tiles(
                                    kind, last - first, VECTORS, 1, lines, x_at, x_stride, w_at, k_bytes, count, to,
                                    COLUMNS * 4, ahead, ahead_stride,
                                )  # fmt: skip
                    for row in range(bottom - top):
                        place, at = (top + row) * num_outputs + column, row * COLUMNS
                        if has_bias:
                            for i in range(width):
                                store(out, place + i, load(sums, at + i) + load(bias, column + i))
                        elif width == COLUMNS:
                            for i in range(COLUMNS):  # a constant number of steps, which needs no check in between
                                store(out, place + i, load(sums, at + i))
                        else:
                            for i in range(width):
                                store(out, place + i, load(sums, at + i))
        if with_amx and configured > 0:
            amx.release()

    return linear
