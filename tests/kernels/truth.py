"""What the operations should give: the formulas spelled out one token and one head at a time, in float64.

Nothing here is vectorised, paged or shared with the package, so that a mistake would have to be made twice.
"""

import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_infer import kernels

from . import parity
from .cases import INTERPRETED
from .parity import Mismatch, poisoned_memory

DTYPES = list(parity.TOLERANCE)
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() and not INTERPRETED else ["cpu"]

_last_call = "nothing"


def on_backends(op: str) -> pytest.MarkDecorator:
    """Run the test once on each backend that has `op`, on each device; the test takes the `backend` fixture."""
    return pytest.mark.kernel(op)


def on_device(op: str, backend: str, device: str) -> Callable[..., Any]:
    """The public operation, in poisoned memory, with arguments from the CPU taken to `device` and results back.

    Strides, gaps and shared storage travel along; what the operation wrote into its arguments comes back, too.
    """
    function = getattr(kernels, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        global _last_call
        _last_call = f"{op} on backend {backend!r} ({device})"
        with poisoned_memory():
            if device == "cpu":
                return function(*args, **kwargs)
            there: dict[int, torch.UntypedStorage] = {}
            here: dict[int, torch.UntypedStorage] = {}

            def send(x: Any) -> Any:
                if isinstance(x, Tensor) and x.device.type == "cpu":
                    storage = x.untyped_storage()
                    here[storage.data_ptr()] = storage
                    there.setdefault(storage.data_ptr(), storage.to(device=device))
                    return _view(x, there[storage.data_ptr()], device)
                return torch.device(device) if x == "cpu" or x == torch.device("cpu") else x

            result = function(*[send(x) for x in args], **{name: send(x) for name, x in kwargs.items()})
            for key, storage in here.items():
                storage.copy_(there[key])
            if isinstance(result, tuple):
                return tuple(_view(x, x.untyped_storage().cpu(), "cpu") for x in result)
            return None if result is None else _view(result, result.untyped_storage().cpu(), "cpu")

    return call


def _view(like: Tensor, storage: torch.UntypedStorage, device: str) -> Tensor:
    empty = torch.empty(0, dtype=like.dtype, device=device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())  # type: ignore[call-overload]


def check_sum(out: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """A sum of two numbers has one right answer."""
    with failing_plainly():
        parity.check_sum(out, truth, dtype, _last_call, _this_test())


def check(out: Tensor, truth: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """`slack` widens the tolerance where the formula itself amplifies a rounding of its inputs."""
    with failing_plainly():
        parity.check(out, truth, dtype, _last_call, _this_test(), slack)


@contextmanager
def failing_plainly() -> Iterator[None]:
    """A mismatch says it all: without a traceback."""
    message = None
    try:
        yield
    except Mismatch as mismatch:
        message = str(mismatch)
    if message is not None:  # outside of the handler, which would show the mismatch a second time
        pytest.fail(message, pytrace=False)


def _this_test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same numbers with gaps of NaN between the rows and the elements."""
    spread = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=x.dtype)
    view = spread[..., 1 : 1 + 2 * x.shape[-1] : 2]
    view.copy_(x)
    return view


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x `[T, heads, head_dim]`: each pair of features as a complex number times exp(i * angle)."""
    out, half = x.double().clone(), cos.shape[1]
    for t, position in enumerate(positions.tolist()):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            turn = complex(float(cos[position, i]), float(sin[position, i]))
            for head in range(x.shape[1]):
                z = complex(float(x[t, head, a]), float(x[t, head, b])) * turn
                out[t, head, a], out[t, head, b] = z.real, z.imag
    return out


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, span: int = 1) -> Tensor:
    """Queries `[n, H, D]` are the last of the `keys` `[L, Hkv, D]`; one query and one head at a time."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    out = torch.empty_like(queries)
    num_queries, num_heads, _ = queries.shape
    length, num_kv_heads, _ = keys.shape
    for row in range(num_queries):
        i = length - num_queries + row
        first = 0 if window is None else max(0, i - window + 1)
        last = next(j for j in reversed(range(length)) if j // span <= i // span)  # of the span that i stands in
        for head in range(num_heads):
            shared = head // (num_heads // num_kv_heads)
            scores = [scale * float(queries[row, head] @ keys[j, shared]) for j in range(first, last + 1)]
            top = max(scores)
            weights = torch.tensor([math.exp(score - top) for score in scores], dtype=torch.float64)
            out[row, head] = weights / weights.sum() @ values[first : last + 1, shared]
    return out


@dataclass(frozen=True)
class PagedCase:
    """Sequences with their keys and values, dense for the truth and paged for the operation.

    Everything in the cache that belongs to no sequence is NaN or inf, and every table entry that a sequence does not
    need is out of range.
    """

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_start: Tensor
    scale: float | None
    window: int | None
    span: int

    @classmethod
    def make(
        cls,
        seed: int,
        lengths: list[tuple[int, int]],
        *,
        block_size: int = 4,
        num_kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        index_dtype: torch.dtype = torch.int32,
        scale: float | None = None,
        window: int | None = None,
        span: int = 1,
        magnitude: float = 1.0,
        spare_columns: int = 2,
    ) -> "PagedCase":
        """`lengths` are (context length, number of new tokens) of each sequence."""
        rng = random.Random(seed)
        num_heads = num_kv_heads * group
        needed = [-(-context // block_size) for context, _ in lengths]
        num_blocks = sum(needed) + 3
        pool = rng.sample(range(num_blocks), sum(needed))
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        key_cache, value_cache = torch.full(shape, math.nan, dtype=dtype), torch.full(shape, math.nan, dtype=dtype)
        value_cache[::2] = math.inf
        tables = torch.full((len(lengths), max(needed, default=0) + spare_columns), -7, dtype=index_dtype)
        tables[:, 1::2] = 10**6
        queries, keys, values = [], [], []
        for s, (context, new) in enumerate(lengths):
            queries.append(magnitude * draw(seed + 7 * s, new, num_heads, head_dim, dtype=dtype))
            keys.append(magnitude * draw(seed + 7 * s + 1, context, num_kv_heads, head_dim, dtype=dtype))
            values.append(magnitude * draw(seed + 7 * s + 2, context, num_kv_heads, head_dim, dtype=dtype))
            blocks, pool = pool[: needed[s]], pool[needed[s] :]
            tables[s, : needed[s]] = torch.tensor(blocks, dtype=index_dtype)
            for j in range(context):
                key_cache[blocks[j // block_size], j % block_size] = keys[s][j]
                value_cache[blocks[j // block_size], j % block_size] = values[s][j]
        if rng.random() < 0.5:  # a backend is at its fastest on the layout that it allocates itself
            own = kernels.allocate_kv_cache(*shape, dtype, "cpu")
            key_cache, value_cache = own[0].copy_(key_cache), own[1].copy_(value_cache)
        starts = [0]
        for _, new in lengths:
            starts.append(starts[-1] + new)
        return cls(
            queries,
            keys,
            values,
            key_cache,
            value_cache,
            tables,
            torch.tensor([context for context, _ in lengths], dtype=index_dtype),
            torch.tensor(starts, dtype=index_dtype),
            scale,
            window,
            span,
        )

    @property
    def query(self) -> Tensor:
        return torch.cat(self.queries) if self.queries else self.key_cache.new_empty((0, *self.key_cache.shape[2:]))

    def truth(self) -> Tensor:
        scale = self.key_cache.shape[-1] ** -0.5 if self.scale is None else self.scale
        rows = [
            attend(q, k, v, scale, self.window, self.span)
            for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
        ]
        return torch.cat(rows) if rows else self.query.double()
