"""What is timed: each operation in the shapes that models give it, with the work that it cannot avoid.

`bytes_moved` counts every input read once and every output written once; `flops` the multiplications and additions of
the formula. They are floors: a kernel that moves more takes longer and shows a lower percentage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from benchmarks.measure import DEVICE
from mini_infer import kernels

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`compute`: matrix products dominate, so that FLOP/s tell more than bytes; `function`: timed instead of the op."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Arguments]
    bytes_moved: int
    flops: int
    compute: bool = False
    function: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        return f"{self.op}, {self.shape}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


LLAMA = Model("Llama-3-8B", 4096, 32, 8, 128, 14336)
QWEN = Model("Qwen3-0.6B", 1024, 16, 8, 128, 3072)
TUTOR = Model("tutor", 256, 8, 4, 32, 768)

# On a GPU 16384 tokens, so that the tensors are larger than the caches; a CPU has less time.
ROWS = ((LLAMA, 16384), (QWEN, 16384), (LLAMA, 64)) if DEVICE == "cuda" else ((QWEN, 512), (TUTOR, 64))
DECODES = (
    ((LLAMA, 32, 4096), (QWEN, 32, 4096), (LLAMA, 1, 32768)) if DEVICE == "cuda" else ((QWEN, 8, 512), (TUTOR, 64, 256))
)
PROMPTS = (
    ((LLAMA, 4096, 4096), (LLAMA, 2048, 4096), (QWEN, 4096, 4096))
    if DEVICE == "cuda"
    else ((QWEN, 256, 512), (TUTOR, 512, 512))
)
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
BLOCK_SIZE = 16


QUANTIZED = ((LLAMA, 1), (LLAMA, 16), (LLAMA, 4096)) if DEVICE == "cuda" else ((QWEN, 1), (QWEN, 16), (QWEN, 256))
PRODUCTS = () if DEVICE == "cuda" else ((QWEN, 1), (QWEN, 16), (QWEN, 256))  # on a GPU these are PyTorch's own


def normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def kernel_cases() -> Iterator[Case]:
    """What `pytest --benchmark` times."""
    for dtype in DTYPES:
        for model, tokens in ROWS:
            yield from row_cases(model, tokens, dtype)
        for model, num_seqs, context in DECODES:
            yield decode_case(model, [context] * num_seqs, dtype)
        for model, new, context in PROMPTS:
            yield prompt_case(model, new, context, dtype)
        for model, tokens in PRODUCTS:
            yield product_case(model, tokens, dtype)
        yield sampling_case(16, 151936, dtype)
        yield drawing_case(16, 151936, dtype)
    yield from quantized_cases()


def quantized_cases() -> Iterator[Case]:
    """Products with weights in 8 and in 4 bits; float8 where it is more than a way to keep numbers."""
    for model, tokens in QUANTIZED:
        for kind in ("int8", "int4") if DEVICE == "cpu" else ("int8", "int4", "float8"):
            yield quantized_case(model, tokens, kind, torch.bfloat16)


def row_cases(model: Model, tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    """The operations that go through a batch token by token."""
    b, heads, kv_heads, dim = dtype.itemsize, model.heads, model.kv_heads, model.head_dim
    n, shape = tokens * model.hidden, f"{model.name}, {tokens} tokens"

    def norm() -> Arguments:
        return {"x": normal(dtype, tokens, model.hidden), "weight": normal(dtype, model.hidden)}

    yield Case("rmsnorm", shape, dtype, norm, 2 * n * b, 4 * n)
    yield Case(
        "add_rmsnorm",
        shape,
        dtype,
        lambda: norm() | {"residual": normal(dtype, tokens, model.hidden)},
        4 * n * b,
        5 * n,
    )

    turned = tokens * (heads + kv_heads) * dim

    def rotary() -> Arguments:
        angles = torch.rand(tokens, dim // 2, device=DEVICE)
        return {
            "q": normal(dtype, tokens, heads, dim),
            "k": normal(dtype, tokens, kv_heads, dim),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "position_ids": torch.arange(tokens, device=DEVICE),
        }

    tables = tokens * (dim * 4 + 8)
    yield Case("apply_rotary_emb", shape, dtype, rotary, 2 * turned * b + tables, 3 * turned)
    if model is not LLAMA:  # which has no norms of queries and keys
        yield Case(
            "qk_norm_rope",
            shape,
            dtype,
            lambda: rotary() | {"q_weight": normal(dtype, dim), "k_weight": normal(dtype, dim)},
            2 * turned * b + tables,
            7 * turned,
        )

    gates = tokens * model.intermediate
    yield Case(
        "silu_and_mul",
        shape,
        dtype,
        lambda: {"x": normal(dtype, tokens, 2 * model.intermediate)},
        3 * gates * b,
        5 * gates,
    )

    stored = tokens * kv_heads * dim

    def write() -> Arguments:
        caches = paged(2 * tokens // BLOCK_SIZE, model, dtype)
        return {
            "key": normal(dtype, tokens, kv_heads, dim),
            "value": normal(dtype, tokens, kv_heads, dim),
            "key_cache": caches[0],
            "value_cache": caches[1],
            "slot_mapping": torch.randperm(2 * tokens, device=DEVICE)[:tokens],
        }

    yield Case("write_kv", shape, dtype, write, 4 * stored * b + 8 * tokens, 0)


def product_case(model: Model, tokens: int, dtype: torch.dtype) -> Case:
    """A feed-forward layer's first product, its weight packed beforehand."""
    inputs, outputs = model.hidden, 2 * model.intermediate
    return Case(
        "pack_linear",
        f"{model.name}, {tokens} tokens x {inputs} to {outputs}",
        dtype,
        lambda: {
            "product": kernels.pack_linear(normal(dtype, outputs, inputs)),
            "x": normal(dtype, tokens, inputs),
        },
        dtype.itemsize * (inputs * outputs + tokens * (inputs + outputs)),
        2 * tokens * inputs * outputs,
        compute=tokens > 16,
        function=lambda product, x: product(x),
    )


def quantized_case(model: Model, tokens: int, kind: str, dtype: torch.dtype) -> Case:
    """The same product, with int8 per row, int4 in groups of 32, or float8 in blocks of 128."""
    inputs, outputs = model.hidden, 2 * model.intermediate
    group = {"int8": inputs, "int4": 32, "float8": 128}[kind]
    code_bytes = inputs // 2 if kind == "int4" else inputs

    def make() -> Arguments:
        codes = torch.randint(-128, 128, (outputs, code_bytes), dtype=torch.int8, device=DEVICE)
        table = None
        if kind == "int4":
            codes, table = codes.view(torch.uint8), torch.arange(-8.0, 8.0, device=DEVICE)
        elif kind == "float8":
            codes = normal(torch.float8_e4m3fn, outputs, inputs)
        scales = (torch.rand(outputs, inputs // group, device=DEVICE) / 100).bfloat16()
        matrix = kernels.QuantizedMatrix(codes, scales, group, None, table)
        return {"product": kernels.pack_quantized(matrix, None, dtype), "x": normal(dtype, tokens, inputs)}

    return Case(
        "pack_quantized",
        f"{model.name}, {kind}, {tokens} tokens x {inputs} to {outputs}",
        dtype,
        make,
        outputs * (code_bytes + 2 * inputs // group) + dtype.itemsize * tokens * (inputs + outputs),
        2 * tokens * inputs * outputs,
        compute=tokens > 16,
        function=lambda product, x: product(x),
    )


def sampling_case(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Case:
    """The likeliest token of each sequence."""
    n = num_rows * vocab_size
    return Case(
        "argmax_logprob",
        f"{num_rows} x {vocab_size} tokens",
        dtype,
        lambda: {"logits": normal(dtype, num_rows, vocab_size)},
        n * dtype.itemsize,
        3 * n,
    )


def drawing_case(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Case:
    """A token of each sequence at random, from the 50 likeliest."""
    n = num_rows * vocab_size
    return Case(
        "draw_tokens",
        f"{num_rows} x {vocab_size} tokens, top_k 50",
        dtype,
        lambda: {
            "logits": normal(dtype, num_rows, vocab_size),
            "temperature": np.full(num_rows, 0.8),
            "top_k": np.full(num_rows, 50),
            "top_p": np.full(num_rows, 0.95),
            "min_p": np.zeros(num_rows),
            "uniform": np.linspace(0, 0.99, num_rows),
        },
        n * dtype.itemsize,
        n,
    )


def paged(num_blocks: int, model: Model, dtype: torch.dtype) -> list[torch.Tensor]:
    """A key and a value cache as the backend in use wants them, filled."""
    caches = kernels.allocate_kv_cache(num_blocks, BLOCK_SIZE, model.kv_heads, model.head_dim, dtype, DEVICE)
    return [cache.copy_(normal(dtype, *cache.shape)) for cache in caches]


def decode_case(model: Model, contexts: list[int], dtype: torch.dtype) -> Case:
    """One new token for each sequence, whose blocks lie scattered over the cache."""
    same = len(set(contexts)) == 1
    shape = f"{model.name}, {len(contexts)} x {contexts[0]} tokens"
    if not same:
        shape = f"{model.name}, {len(contexts)} x {min(contexts)} to {max(contexts)} tokens"
    return _attention("paged_attention", shape, model, [1] * len(contexts), contexts, dtype)


def prompt_case(model: Model, new: int, context: int, dtype: torch.dtype) -> Case:
    """A chunk of a prompt, the tokens before it in the cache."""
    shape = f"{model.name}, {new} of {context} tokens new"
    return _attention("paged_prefill_attention", shape, model, [new], [context], dtype)


def _attention(op: str, shape: str, model: Model, new: list[int], contexts: list[int], dtype: torch.dtype) -> Case:
    b, heads, kv_heads, dim = dtype.itemsize, model.heads, model.kv_heads, model.head_dim
    blocks = [-(-context // BLOCK_SIZE) for context in contexts]

    def make() -> Arguments:
        tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32, device=DEVICE)
        for table, ids in zip(tables, torch.randperm(sum(blocks), device=DEVICE).split(blocks), strict=True):
            table[: len(ids)] = ids
        key_cache, value_cache = paged(sum(blocks), model, dtype)
        arguments = {
            "query": normal(dtype, sum(new), heads, dim),
            "key_cache": key_cache,
            "value_cache": value_cache,
            "block_tables": tables,
            "context_lens": torch.tensor(contexts, device=DEVICE).int(),
        }
        if op == "paged_prefill_attention":
            arguments["query_start"] = torch.tensor([0, *accumulate(new)], device=DEVICE).int()
        return arguments

    seen = sum(n * context - n * (n - 1) // 2 for n, context in zip(new, contexts, strict=True))  # causal pairs
    return Case(
        op,
        shape,
        dtype,
        make,
        b * (2 * sum(contexts) * kv_heads * dim + 2 * sum(new) * heads * dim),
        4 * seen * heads * dim,
        compute=op == "paged_prefill_attention",
    )
