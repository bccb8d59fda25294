"""What the operations should give: the formulas spelled out one token and one head at a time, in float64.

Nothing here is vectorised, paged or shared with the package, so that a mistake would have to be made twice.
"""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mini_infer import kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def on_backends(op: str) -> pytest.MarkDecorator:
    """Run the test once on each backend that has `op` on the CPU; the test takes the `backend` fixture."""
    return pytest.mark.parametrize("backend", kernels.available_backends(op, "cpu"), indirect=True)


def worst_error(out: Tensor, truth: Tensor) -> float:
    """‖out - truth‖ / ‖truth‖ of the worst row (the last dimension is a row); rows of zeros must be exact."""
    assert out.shape == truth.shape
    if out.numel() == 0:
        return 0.0
    assert bool(out.isfinite().all()), "NaN or inf in the output"
    difference = (out.double() - truth.double()).norm(dim=-1)
    size = truth.double().norm(dim=-1)
    return float(
        torch.where(size == 0, difference.sign() * math.inf, difference / size).nan_to_num(0.0, math.inf).max()
    )


def check(out: Tensor, truth: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """`slack` widens the tolerance where the formula itself amplifies a rounding of its inputs."""
    assert out.dtype == dtype
    error = worst_error(out, truth)
    assert error < slack * TOLERANCE[dtype], f"relative error {error:.2e} in {dtype}"


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


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Queries `[n, H, D]` are the last of the `keys` `[L, Hkv, D]`; causal, one query and one head at a time."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    out = torch.empty_like(queries)
    num_queries, num_heads, _ = queries.shape
    length, num_kv_heads, _ = keys.shape
    for row in range(num_queries):
        i = length - num_queries + row
        first = 0 if window is None else max(0, i - window + 1)
        for head in range(num_heads):
            shared = head // (num_heads // num_kv_heads)
            scores = [scale * float(queries[row, head] @ keys[j, shared]) for j in range(first, i + 1)]
            top = max(scores)
            weights = torch.tensor([math.exp(score - top) for score in scores], dtype=torch.float64)
            out[row, head] = weights / weights.sum() @ values[first : i + 1, shared]
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
        )

    @property
    def query(self) -> Tensor:
        return torch.cat(self.queries) if self.queries else self.key_cache.new_empty((0, *self.key_cache.shape[2:]))

    def truth(self) -> Tensor:
        scale = self.key_cache.shape[-1] ** -0.5 if self.scale is None else self.scale
        rows = [
            attend(q, k, v, scale, self.window) for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
        ]
        return torch.cat(rows) if rows else self.query.double()
