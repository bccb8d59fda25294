"""Elements that lie more than 2³¹ apart: offsets in 32 bits would wrap around.

The tensors are views with huge strides into memory that is reserved and never touched in between. On GPUs, where memory
is taken as a whole, the "huge" cases of the table ask the same.
"""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mini_infer import kernels

from .truth import draw, on_backends

APART = 2**30 + 2**10
ROWS = 4  # so the last row begins beyond 2³¹ elements, and beyond 2³² bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, reserved memory counts as used")

Spread = Callable[[Tensor], Tensor]


@pytest.fixture
def spread(device: str) -> Spread:
    """Gives a tensor again with its four rows far from each other, in a dtype of one or two bytes per element."""
    if device != "cpu":
        pytest.skip("the table's huge cases are for GPUs")

    def spread(x: Tensor) -> Tensor:
        assert len(x) == ROWS and x.is_contiguous()
        room = torch.empty(APART * (ROWS - 1) + x[0].numel(), dtype=x.dtype)
        far = room.as_strided(x.shape, (APART, *x.stride()[1:]))
        far.copy_(x)
        return far

    return spread


@pytest.fixture(autouse=True)
def nothing_is_filled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the poison of the other tests, which would touch all of the memory."""
    for op in kernels.OPS:
        monkeypatch.setattr(kernels, op, getattr(sys.modules["mini_infer.kernels.by_hand"], op))


def rows(seed: int, *shape: int) -> Tensor:
    return draw(seed, ROWS, *shape, dtype=torch.bfloat16)


@on_backends("rmsnorm")
def test_rmsnorm(backend: str, spread: Spread) -> None:
    x, weight = rows(1, 8), rows(2, 8)[0]
    assert torch.equal(kernels.rmsnorm(spread(x), weight), kernels.rmsnorm(x, weight))


@on_backends("add_rmsnorm")
def test_add_rmsnorm(backend: str, spread: Spread) -> None:
    x, residual, weight = rows(1, 8), rows(2, 8), rows(3, 8)[0]
    for far, near in zip(
        kernels.add_rmsnorm(spread(x), spread(residual), weight), kernels.add_rmsnorm(x, residual, weight), strict=True
    ):
        assert torch.equal(far, near)


@on_backends("silu_and_mul")
def test_silu_and_mul(backend: str, spread: Spread) -> None:
    x = rows(1, 16)
    assert torch.equal(kernels.silu_and_mul(spread(x)), kernels.silu_and_mul(x))


@on_backends("apply_rotary_emb")
def test_apply_rotary_emb(backend: str, spread: Spread) -> None:
    q, k, angles = rows(1, 2, 8), rows(2, 1, 8), rows(3, 4)
    positions = torch.tensor([3, 0, 2, 1])
    far = kernels.apply_rotary_emb(spread(q), spread(k), spread(angles.cos()), spread(angles.sin()), positions)
    near = kernels.apply_rotary_emb(q, k, angles.cos(), angles.sin(), positions)
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


@on_backends("qk_norm_rope")
def test_qk_norm_rope(backend: str, spread: Spread) -> None:
    q, k, weight, angles = rows(1, 2, 8), rows(2, 1, 8), rows(4, 8)[0], rows(3, 4)
    tables = angles.cos(), angles.sin()
    positions = torch.tensor([3, 0, 2, 1])
    far = kernels.qk_norm_rope(spread(q), spread(k), weight, weight, *map(spread, tables), positions)
    near = kernels.qk_norm_rope(q, k, weight, weight, *tables, positions)
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@on_backends("write_kv")
def test_write_kv(backend: str, spread: Spread, index_dtype: torch.dtype) -> None:
    cache = torch.zeros(ROWS, 2, 1, 8, dtype=torch.bfloat16)
    keys, values = spread(cache), spread(cache)
    key, value = rows(1, 1, 8), rows(2, 1, 8)
    slots = torch.tensor([7, 0, 5, -1], dtype=index_dtype)
    kernels.write_kv(spread(key), spread(value), keys, values, slots)
    for token, slot in enumerate(slots[:3].tolist()):
        assert torch.equal(keys[slot // 2, slot % 2], key[token])
        assert torch.equal(values[slot // 2, slot % 2], value[token])
    assert torch.count_nonzero(keys.abs().sum(-1)) == torch.count_nonzero(values.abs().sum(-1)) == 3


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@on_backends("paged_attention")
def test_attention(backend: str, spread: Spread, index_dtype: torch.dtype) -> None:
    query, keys, values = rows(1, 2, 8), rows(2, 4, 1, 8), rows(3, 4, 1, 8)
    tables = torch.tensor([[3, 1], [0, 3], [2, 3], [3, 2]], dtype=index_dtype)
    contexts = torch.tensor([7, 8, 5, 4], dtype=index_dtype)
    near = kernels.paged_attention(query, keys, values, tables, contexts)
    assert torch.equal(kernels.paged_attention(spread(query), spread(keys), spread(values), tables, contexts), near)
    chunks = (tables[:2], torch.tensor([7, 8]).to(index_dtype), torch.tensor([0, 1, 4]).to(index_dtype))
    near = kernels.paged_prefill_attention(query, keys, values, *chunks)
    assert torch.equal(kernels.paged_prefill_attention(spread(query), spread(keys), spread(values), *chunks), near)
