"""The table of cases: what every backend of an operation, also an external one, is run through.

A case is a name, a size and a recipe for arguments. Its truth is the reference in float64 on the same arguments; that
the reference itself is right is shown by the other tests, which spell the formulas out token by token.

Sizes: "small" runs everywhere; "medium" wherever code is compiled (interpreted Triton takes a minute for what a CPU
does in a millisecond); "large" on GPUs only; "huge", where 32-bit offsets overflow, on GPUs with the memory for it.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HUGE_NEEDS = 70 << 30
Arguments = dict[str, Any]


class Draw:
    """Random tensors of one dtype on one device; the same for the same seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, magnitude: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (magnitude * x).to(self.dtype)

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)

    def gaps(self, x: Tensor) -> Tensor:
        """The same numbers with NaN between rows and between elements."""
        spread = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=x.dtype, device=x.device)
        view = spread[..., 1 : 1 + 2 * x.shape[-1] : 2]
        view.copy_(x)
        return view


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[Draw], Arguments]
    size: str = "small"
    slack: float = 1.0
    """Widens the tolerance where the formula itself amplifies a rounding, as a softmax of huge scores does."""
    has_codes: bool = False
    """Whether its KV cache has 8 bits."""

    def runs_on(self, device: str, dtype: torch.dtype) -> bool:
        if self.size == "huge":
            return device != "cpu" and dtype == torch.bfloat16 and torch.cuda.mem_get_info()[1] > HUGE_NEEDS
        if self.size == "medium":
            return not INTERPRETED
        return self.size == "small" or device != "cpu"

    def __str__(self) -> str:
        return f"{self.op}[{self.name}]"


def norm(*shape: int, magnitude: float = 1.0, strided: bool = False) -> Callable[[Draw], Arguments]:
    def make(draw: Draw) -> Arguments:
        x = draw.normal(*shape).clamp(-2, 2) * magnitude  # 30000 times more than 2 is not a float16
        weight = draw.normal(shape[-1])
        return {"x": draw.gaps(x), "weight": draw.gaps(weight)} if strided else {"x": x, "weight": weight}

    return make


def add_norm(*shape: int, magnitude: float = 1.0, strided: bool = False) -> Callable[[Draw], Arguments]:
    def make(draw: Draw) -> Arguments:
        arguments = norm(*shape, magnitude=magnitude / 2, strided=strided)(draw)
        residual = draw.normal(*shape).clamp(-2, 2) * (magnitude / 2)
        return arguments | {"residual": residual.transpose(0, -1).contiguous().transpose(0, -1)}

    return make


def gate(*shape: int, magnitude: float = 1.0, strided: bool = False) -> Callable[[Draw], Arguments]:
    def make(draw: Draw) -> Arguments:
        x = draw.normal(*shape, magnitude=magnitude)
        return {"x": draw.gaps(x) if strided else x}

    return make


def rotary(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    *,
    interleaved: bool = False,
    index_dtype: torch.dtype = torch.int64,
    magnitude: float = 1.0,
    fused: bool = False,
    norms: bool = False,
) -> Callable[[Draw], Arguments]:
    """`fused`: q and k are views into one tensor, as a fused projection gives them. `norms`: for qk_norm_rope."""
    half = (head_dim if rotary_dim is None else rotary_dim) // 2

    def make(draw: Draw) -> Arguments:
        if fused:
            both = draw.normal(tokens, heads + kv_heads, head_dim, magnitude=magnitude)
            q, k = both[:, :heads], both[:, heads:]
        else:
            q = draw.normal(tokens, heads, head_dim, magnitude=magnitude)
            k = draw.normal(tokens, kv_heads, head_dim, magnitude=magnitude)
        powers = torch.arange(half, device=draw.device, dtype=torch.float64) / max(half, 1)
        angles = torch.arange(4096, device=draw.device, dtype=torch.float64)[:, None] * 10000.0**-powers
        positions = draw.order(4096).repeat(-(-tokens // 4096))[:tokens].to(index_dtype)
        arguments = {"q": q, "k": k, "cos": angles.cos().float(), "sin": angles.sin().float()}
        if norms:
            arguments |= {"q_weight": draw.normal(head_dim), "k_weight": draw.normal(head_dim)}
        return {**arguments, "position_ids": positions, "interleaved": interleaved}

    return make


def kv_write(
    tokens: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, index_dtype: torch.dtype = torch.int64
) -> Callable[[Draw], Arguments]:
    def make(draw: Draw) -> Arguments:
        slots = draw.order(blocks * block_size)[:tokens].to(index_dtype)
        slots[3::7] = -1
        shape = (blocks, block_size, kv_heads, head_dim)
        caches = [torch.full(shape, number, dtype=draw.dtype, device=draw.device) for number in (7, 8)]
        key, value = draw.normal(tokens, kv_heads, head_dim), draw.normal(tokens, kv_heads, head_dim)
        key[3::7] = math.nan  # what is written nowhere
        return {"key": key, "value": value, "key_cache": caches[0], "value_cache": caches[1], "slot_mapping": slots}

    return make


def paged(
    contexts: list[int],
    new: list[int] | None = None,
    *,
    block_size: int = 16,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    window: int | None = None,
    span: int = 1,
    magnitude: float = 1.0,
    index_dtype: torch.dtype = torch.int32,
    shared: int = 0,
    spare_blocks: int = 3,
) -> Callable[[Draw], Arguments]:
    """Sequences with the given numbers of tokens in the cache, the last `new` of which are asked (decode: one each).

    The first `shared` blocks belong to all sequences. Slots that belong to none hold NaN and inf, and unused table
    entries are far out of range, so that whoever looks at them is found out.
    """

    def make(draw: Draw) -> Arguments:
        needed = [-(-context // block_size) for context in contexts]
        own = [max(0, blocks - shared) for blocks in needed]
        num_blocks = shared + sum(own) + spare_blocks
        order = draw.order(num_blocks).to(index_dtype)
        common, pool = order[:shared], order[shared:]
        tables = torch.full((len(contexts), max(needed) + 2), -7, dtype=index_dtype, device=draw.device)
        tables[:, 1::2] = 10**6
        caches = [
            torch.full((num_blocks, block_size, kv_heads, head_dim), garbage, dtype=draw.dtype, device=draw.device)
            for garbage in (math.nan, math.inf)
        ]
        for row, context, blocks in zip(tables, contexts, own, strict=True):
            mine, pool = torch.cat((common, pool[:blocks])), pool[blocks:]
            row[: len(mine)] = mine
            slots = torch.arange(context, device=draw.device)
            places = mine.long()[slots // block_size], slots % block_size
            for cache in caches:  # a shared block is drawn anew for each owner; the last one's tokens count for all
                cache[places] = draw.normal(context, kv_heads, head_dim, magnitude=magnitude)
        counts = [1] * len(contexts) if new is None else new
        arguments = {
            "query": draw.normal(sum(counts), kv_heads * group, head_dim, magnitude=magnitude),
            "key_cache": caches[0],
            "value_cache": caches[1],
            "block_tables": tables,
            "context_lens": torch.tensor(contexts, dtype=index_dtype, device=draw.device),
            "sliding_window": window,
        }
        if new is not None:
            starts = torch.tensor([0, *new], device=draw.device).cumsum(0).to(index_dtype)
            arguments |= {"query_start": starts, "span": span}
        return arguments

    return make


def in_codes(make: Callable[[Draw], Arguments], dtype: torch.dtype) -> Callable[[Draw], Arguments]:
    """The same with a cache of 8 bits; a slot that held NaN or an infinity gets such a scale."""
    largest = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]

    def coded(draw: Draw) -> Arguments:
        arguments, sides = make(draw), []
        for name in ("key_cache", "value_cache"):
            numbers = arguments[name].float()
            scale = (numbers.abs().amax(-1) / largest).bfloat16()
            codes = (numbers / scale.float()[..., None]).nan_to_num(0)
            arguments[name] = (codes.round() if dtype is torch.int8 else codes).to(dtype)
            sides.append(scale.transpose(1, 2))  # [num_blocks, num_kv_heads, block_size]
        return arguments | {"kv_scales": torch.stack(sides, dim=2).contiguous()}

    return coded


def _in_codes() -> Iterator[Case]:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        for label, make in (
            ("one token", kv_write(1, 2, 16, 2, 64)),
            ("int32 slots", kv_write(20, 4, 16, 3, 40, torch.int32)),
            ("blocks of one", kv_write(9, 12, 1, 2, 33)),
        ):
            yield Case("write_kv", f"{label}, {name}", in_codes(make, dtype))
        many = kv_write(2000, 200, 16, 8, 128)
        yield Case("write_kv", f"Llama-3-8B, {name}", in_codes(many, dtype), "medium")
        for label, chunks in (("paged_attention", None), ("paged_prefill_attention", [20, 1, 5])):
            edges = paged([32, 17, 5], chunks, block_size=16, head_dim=32)
            yield Case(label, f"block edges, {name}", in_codes(edges, dtype))
            odd = paged([20, 5, 9], chunks, block_size=7, kv_heads=1, group=3, head_dim=33)
            yield Case(label, f"head_dim 33, {name}", in_codes(odd, dtype))
            window = paged([60, 3, 40], chunks and [50, 3, 9], window=16, kv_heads=1)
            yield Case(label, f"sliding window, {name}", in_codes(window, dtype))
            llama = paged([300, 1, 500], chunks and [300, 1, 130], kv_heads=8, group=4, head_dim=128)
            yield Case(label, f"Llama-3-8B, {name}", in_codes(llama, dtype), "medium")
            long = paged([4096] * 7 + [3], chunks and [100] * 7 + [3], kv_heads=8, group=4, head_dim=128)
            yield Case(label, f"8 x 4k, {name}", in_codes(long, dtype), "large")
        spans = paged([60, 3, 40], [50, 3, 9], span=16, kv_heads=1)
        yield Case("paged_prefill_attention", f"spans, {name}", in_codes(spans, dtype))


def _norms() -> Iterator[Case]:
    for op, make in (("rmsnorm", norm), ("add_rmsnorm", add_norm)):
        yield Case(op, "one number", make(1, 1))
        yield Case(op, "odd sizes", make(3, 2, 129))
        yield Case(op, "no rows", make(0, 64))
        yield Case(op, "gaps between the elements", make(5, 70, strided=True))
        yield Case(op, "large numbers", make(4, 200, magnitude=20000.0))
        yield Case(op, "small numbers", make(4, 200, magnitude=1e-3))
        yield Case(op, "Qwen3-0.6B", make(4, 1024))
        yield Case(op, "Qwen3-0.6B's heads", make(6, 16, 128))
        yield Case(op, "Llama-3-8B", make(33, 4096), "medium")
        yield Case(op, "a long row", make(2, 16384), "medium")
        yield Case(op, "a longer row, no power of two", make(3, 20001), "medium")
        yield Case(op, "many rows", make(70_000, 128), "medium")
        yield Case(op, "a big prompt of Llama-3-8B", make(16384, 4096), "large")
        yield Case(op, "more elements than 32 bits count", make(525_000, 4096), "huge")


def _gates() -> Iterator[Case]:
    op = "silu_and_mul"
    yield Case(op, "one pair", gate(1, 2))
    yield Case(op, "odd sizes", gate(3, 2, 2 * 65))
    yield Case(op, "no rows", gate(0, 64))
    yield Case(op, "gaps between the elements", gate(5, 140, strided=True))
    yield Case(op, "large numbers", gate(4, 300, magnitude=60.0))
    yield Case(op, "Qwen3-0.6B", gate(2, 2 * 3072))
    yield Case(op, "Llama-3-8B", gate(33, 2 * 14336), "medium")
    yield Case(op, "many rows", gate(70_000, 2 * 64), "medium")
    yield Case(op, "a big prompt of Llama-3-8B", gate(16384, 2 * 14336), "large")
    yield Case(op, "more elements than 32 bits count", gate(80_000, 2 * 14336), "huge")


def _rotations() -> Iterator[Case]:
    for interleaved, style in ((False, "half-split"), (True, "interleaved")):
        op = "apply_rotary_emb"
        yield Case(op, f"Qwen3-0.6B, {style}", rotary(3, 16, 8, 128, interleaved=interleaved))
        yield Case(op, f"odd head_dim, {style}", rotary(4, 3, 1, 33, 20, interleaved=interleaved))
        yield Case(op, f"views into one tensor, {style}", rotary(5, 4, 2, 48, interleaved=interleaved, fused=True))
        yield Case(op, f"head_dim 256, {style}", rotary(2, 2, 1, 256, interleaved=interleaved))
        yield Case(op, f"Llama-3-8B, {style}", rotary(100, 32, 8, 128, interleaved=interleaved), "medium")
        yield Case(op, f"a big prompt, {style}", rotary(16384, 32, 8, 128, interleaved=interleaved), "large")
        op = "qk_norm_rope"
        yield Case(op, f"Qwen3-0.6B, {style}", rotary(3, 16, 8, 128, interleaved=interleaved, norms=True))
        yield Case(op, f"odd head_dim, {style}", rotary(4, 3, 1, 33, 20, interleaved=interleaved, norms=True))
        views = rotary(5, 4, 2, 48, interleaved=interleaved, fused=True, norms=True, magnitude=5000.0)
        yield Case(op, f"large numbers in one tensor, {style}", views)
        yield Case(op, f"many tokens, {style}", rotary(900, 16, 8, 128, interleaved=interleaved, norms=True), "medium")
        big = rotary(16384, 16, 8, 128, interleaved=interleaved, norms=True)
        yield Case(op, f"a big prompt, {style}", big, "large")
        op = "apply_rotary_emb"
    yield Case(op, "int32 positions", rotary(4, 2, 1, 16, index_dtype=torch.int32))
    yield Case(op, "large numbers", rotary(4, 2, 1, 64, magnitude=8000.0))
    yield Case(op, "nothing turns", rotary(2, 2, 1, 16, 0))


def _writes() -> Iterator[Case]:
    op = "write_kv"
    yield Case(op, "one token", kv_write(1, 2, 16, 2, 64))
    yield Case(op, "blocks of one", kv_write(9, 12, 1, 2, 33))
    yield Case(op, "int32 slots", kv_write(20, 4, 16, 3, 40, torch.int32))
    yield Case(op, "blocks of 512", kv_write(12, 2, 512, 1, 16))
    yield Case(op, "Llama-3-8B", kv_write(2000, 200, 16, 8, 128), "medium")
    yield Case(op, "a cache of more elements than 32 bits count", kv_write(4096, 140_000, 16, 8, 128), "huge")


def _decodes() -> Iterator[Case]:
    op = "paged_attention"
    yield Case(op, "one token", paged([1]))
    yield Case(op, "block edges", paged([15, 16, 17, 1], head_dim=32))
    yield Case(op, "one long beside many single tokens", paged([150, *[1] * 9], kv_heads=1, head_dim=32))
    yield Case(op, "shared blocks", paged([40, 35, 17, 60], shared=2, block_size=8, head_dim=32))
    yield Case(op, "head_dim 80, group 3", paged([20, 5], kv_heads=1, group=3, head_dim=80))
    yield Case(op, "head_dim 33", paged([20, 5], head_dim=33, block_size=7))
    yield Case(op, "head_dim 256", paged([20, 5], kv_heads=1, head_dim=256))
    yield Case(op, "blocks of one, int64 tables", paged([20, 5], block_size=1, index_dtype=torch.int64))
    yield Case(op, "a block of 512", paged([300, 2], block_size=512, kv_heads=1))
    yield Case(op, "sliding window", paged([100, 3, 16], window=16, kv_heads=1))
    yield Case(op, "no group", paged([33, 4], group=1, kv_heads=3, head_dim=16))
    yield Case(op, "large scores", paged([40, 7], magnitude=20.0, head_dim=32), slack=400.0)
    yield Case(op, "Llama-3-8B", paged([300, 1, 1000, 77], kv_heads=8, group=4, head_dim=128), "medium")
    yield Case(op, "one long beside many", paged([5000, *[1] * 63], kv_heads=2, head_dim=64), "medium")
    yield Case(op, "a window in a long context", paged([5000, 90], window=1024, kv_heads=2), "medium")
    yield Case(op, "32k tokens", paged([32768], kv_heads=8, group=4, head_dim=128), "large")
    yield Case(op, "32 x 4k", paged([4096] * 31 + [3], kv_heads=8, group=4, head_dim=128, shared=20), "large")
    yield Case(op, "256 ragged", paged([1 + 37 * i for i in range(256)], kv_heads=2, head_dim=128), "large")
    huge = paged([4000, 700], kv_heads=8, head_dim=128, spare_blocks=140_000)
    yield Case(op, "a cache of more elements than 32 bits count", huge, "huge")


def _prefills() -> Iterator[Case]:
    op = "paged_prefill_attention"
    yield Case(op, "one token", paged([1], [1]))
    yield Case(op, "a fresh prompt", paged([37], [37], head_dim=32))
    yield Case(op, "a cached prefix", paged([60, 33], [20, 1], head_dim=32))
    yield Case(op, "one long beside many single tokens", paged([70, *[1] * 6], [70, *[1] * 6], kv_heads=1, head_dim=16))
    yield Case(op, "one long beside many decodes", paged([70, *[9] * 6], [70, *[1] * 6], kv_heads=1, head_dim=16))
    yield Case(op, "shared blocks", paged([40, 35, 60], [8, 3, 28], shared=2, block_size=8, head_dim=32))
    yield Case(op, "head_dim 80, group 3", paged([20, 5], [9, 5], kv_heads=1, group=3, head_dim=80))
    yield Case(op, "head_dim 33", paged([20, 5], [13, 2], head_dim=33, block_size=7))
    yield Case(op, "head_dim 256", paged([20, 5], [3, 5], kv_heads=1, head_dim=256))
    yield Case(op, "blocks of one, int64", paged([20, 5], [9, 5], block_size=1, index_dtype=torch.int64))
    yield Case(op, "a block of 512", paged([100, 2], [10, 1], block_size=512, kv_heads=1))
    yield Case(op, "sliding window", paged([60, 3, 40], [50, 3, 9], window=16, kv_heads=1))
    yield Case(op, "spans", paged([60, 3, 40], [50, 3, 9], span=16, kv_heads=1))
    yield Case(op, "everybody sees everybody", paged([37, 5], [30, 5], span=1000, kv_heads=1))
    yield Case(op, "large scores", paged([40, 7], [11, 7], magnitude=20.0, head_dim=32), slack=400.0)
    llama = paged([300, 1, 500, 77], [300, 1, 130, 12], kv_heads=8, group=4, head_dim=128)
    yield Case(op, "Llama-3-8B", llama, "medium")
    yield Case(op, "a window in a long prompt", paged([1500, 90], [1000, 90], window=256, kv_heads=2), "medium")
    yield Case(op, "spans of a long prompt", paged([1500, 90], [1000, 90], span=100, kv_heads=2), "medium")
    yield Case(op, "8k tokens", paged([8192], [8192], kv_heads=2, group=4, head_dim=128), "large")
    yield Case(op, "half of 8k cached", paged([8192], [4096], kv_heads=2, group=4, head_dim=128), "large")
    ragged = paged([1 + 61 * i for i in range(64)], [1 + 13 * i for i in range(64)], kv_heads=2, head_dim=128)
    yield Case(op, "64 ragged", ragged, "large")
    huge = paged([4000, 700], [500, 1], kv_heads=8, head_dim=128, spare_blocks=140_000)
    yield Case(op, "a cache of more elements than 32 bits count", huge, "huge")


CASES = [
    *_norms(),
    *_gates(),
    *_rotations(),
    *_writes(),
    *_decodes(),
    *_prefills(),
    *(replace(case, has_codes=True) for case in _in_codes()),
]
