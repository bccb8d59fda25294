"""Unusable arguments are refused by name, with what was expected and what came."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mini_infer import kernels
from mini_infer.exceptions import KernelError, MiniInferError

F32, I32 = torch.float32, torch.int32


def f(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def metadata(**changed: object) -> kernels.AttentionMetadata:
    """A decode and a prompt chunk of two tokens."""
    good: dict[str, object] = {
        "slot_mapping": torch.arange(3),
        "query_start_loc": torch.tensor([0, 1, 3]),
        "prefill_start_loc": torch.tensor([0, 2]),
        "context_lens": torch.tensor([2, 5]),
        "block_tables": f(2, 2, dtype=I32),
        "num_decodes": 1,
    }
    return kernels.AttentionMetadata(**{**good, **changed})  # type: ignore[arg-type]


def quantized(**changed: object) -> kernels.QuantizedMatrix:
    """5 outputs of 8 inputs in 4 bits, two groups each."""
    good: dict[str, object] = {"codes": f(5, 4, dtype=torch.uint8), "scales": f(5, 2), "group": 4, "table": f(16)}
    return kernels.QuantizedMatrix(**{**good, **changed})  # type: ignore[arg-type]


GOOD: dict[str, dict[str, object]] = {
    "argmax_logprob": {"logits": f(3, 8)},
    "draw_tokens": {
        "logits": f(3, 8),
        **{name: np.full(3, 0.5) for name in ("temperature", "top_p", "min_p", "uniform")},
        "top_k": np.full(3, 4),
    },
    "pack_linear": {"weight": f(5, 8), "bias": f(5)},
    "pack_quantized": {"matrix": quantized(), "bias": f(5), "dtype": F32},
    "rmsnorm": {"x": f(3, 8), "weight": f(8), "eps": 1e-6},
    "add_rmsnorm": {"x": f(3, 8), "residual": f(3, 8), "weight": f(8)},
    "apply_rotary_emb": {
        "q": f(3, 4, 8),
        "k": f(3, 2, 8),
        "cos": f(9, 4),
        "sin": f(9, 4),
        "position_ids": f(3, dtype=I32),
    },
    "qk_norm_rope": {
        "q": f(3, 4, 8),
        "k": f(3, 2, 8),
        "q_weight": f(8),
        "k_weight": f(8),
        "cos": f(9, 4),
        "sin": f(9, 4),
        "position_ids": f(3, dtype=I32),
    },
    "silu_and_mul": {"x": f(3, 8)},
    "allocate_kv_cache": {
        "num_blocks": 2,
        "block_size": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dtype": F32,
        "device": "cpu",
    },
    "write_kv": {
        "key": f(3, 2, 8),
        "value": f(3, 2, 8),
        "key_cache": f(5, 4, 2, 8),
        "value_cache": f(5, 4, 2, 8),
        "slot_mapping": torch.arange(3),
    },
    "paged_attention": {
        "query": f(3, 4, 8),
        "key_cache": f(5, 4, 2, 8),
        "value_cache": f(5, 4, 2, 8),
        "block_tables": f(3, 2, dtype=I32),
        "context_lens": torch.tensor([1, 5, 8]),
    },
    "paged_prefill_attention": {
        "query": f(3, 4, 8),
        "key_cache": f(5, 4, 2, 8),
        "value_cache": f(5, 4, 2, 8),
        "block_tables": f(2, 2, dtype=I32),
        "context_lens": torch.tensor([2, 5]),
        "query_start": torch.tensor([0, 2, 3]),
    },
    "attention": {
        "query": f(3, 4, 8),
        "key": f(3, 2, 8),
        "value": f(3, 2, 8),
        "key_cache": f(5, 4, 2, 8),
        "value_cache": f(5, 4, 2, 8),
        "metadata": metadata(),
    },
}

BAD = [  # operation, argument, value, what the message says
    (
        "rmsnorm",
        "x",
        f(),
        "x must be bfloat16 or float16 or float32 or float64 [..., hidden_size]; got float32 [] on cpu",
    ),
    ("rmsnorm", "x", f(3, 8, dtype=I32), "got int32 [3, 8] on cpu"),
    ("rmsnorm", "x", [1.0, 2.0], "got list"),
    ("rmsnorm", "weight", f(7), "weight must be float32 [8] on cpu; got float32 [7] on cpu"),
    ("rmsnorm", "weight", f(8, dtype=torch.bfloat16), "weight must be float32 [8] on cpu; got bfloat16 [8] on cpu"),
    ("rmsnorm", "weight", f(8, device="meta"), "weight must be float32 [8] on cpu; got float32 [8] on meta"),
    ("rmsnorm", "weight", None, "got NoneType"),
    ("add_rmsnorm", "residual", f(1, 8), "residual must be float32 [3, 8] on cpu; got float32 [1, 8] on cpu"),
    ("add_rmsnorm", "weight", f(1), "weight must be float32 [8]"),
    ("apply_rotary_emb", "q", f(8), "q must be"),
    (
        "apply_rotary_emb",
        "k",
        f(2, 2, 8),
        "k must be float32 [3, num_kv_heads, 8] on cpu; got float32 [2, 2, 8] on cpu",
    ),
    ("apply_rotary_emb", "k", f(3, 2, 6), "k must be"),
    ("apply_rotary_emb", "cos", f(9, 5), "cos turns 10 features but q has head_dim 8"),
    ("apply_rotary_emb", "cos", f(3, 1, 4), "cos must be"),
    ("apply_rotary_emb", "sin", f(8, 4), "sin must be float32 [9, 4] on cpu; got float32 [8, 4] on cpu"),
    (
        "apply_rotary_emb",
        "position_ids",
        f(3),
        "position_ids must be int32 or int64 [3] on cpu; got float32 [3] on cpu",
    ),
    ("apply_rotary_emb", "position_ids", f(3, 1, dtype=I32), "position_ids must be"),
    ("qk_norm_rope", "k", f(3, 2, 6), "k must be float32 [3, num_kv_heads, 8] on cpu; got float32 [3, 2, 6] on cpu"),
    ("qk_norm_rope", "q_weight", f(4, 8), "q_weight must be float32 [8] on cpu; got float32 [4, 8] on cpu"),
    ("qk_norm_rope", "k_weight", f(6), "k_weight must be float32 [8]"),
    ("silu_and_mul", "x", f(3, 7), "x must have an even last dimension; got float32 [3, 7] on cpu"),
    ("silu_and_mul", "x", f(3, 8, dtype=torch.int64), "got int64 [3, 8] on cpu"),
    ("allocate_kv_cache", "block_size", 0, "sizes must be positive; got num_blocks=2, block_size=0"),
    ("allocate_kv_cache", "num_blocks", -1, "num_blocks=-1"),
    ("allocate_kv_cache", "dtype", I32, "dtype must be bfloat16 or float16 or float32 or float64 or float8"),
    ("write_kv", "key", f(3, 8), "key must be"),
    ("write_kv", "value", f(3, 2, 7), "value must be float32 [3, 2, 8]"),
    ("write_kv", "key_cache", f(5, 4, 1, 8), "key_cache must be float32 [num_blocks, block_size, 2, 8] on cpu"),
    ("write_kv", "value_cache", f(5, 4, 2, 8, dtype=torch.float16), "got float16 [5, 4, 2, 8] on cpu"),
    (
        "write_kv",
        "slot_mapping",
        torch.arange(4),
        "slot_mapping must be int32 or int64 [3] on cpu; got int64 [4] on cpu",
    ),
    ("write_kv", "kv_scales", f(5, 2, 2, 4), "key_cache must be float8_e4m3fn or int8"),
    ("paged_attention", "key_cache", f(5, 4, 2, 8, dtype=torch.int8), "key_cache must be float32"),
    ("paged_attention", "kv_scales", f(5, 2, 2, 4), "key_cache must be float8_e4m3fn or int8"),
    ("paged_attention", "query", f(3, 8), "query must be"),
    ("paged_attention", "query", f(3, 3, 8), "query's 3 heads must be a multiple of key_cache's 2"),
    (
        "paged_attention",
        "key_cache",
        f(5, 4, 2, 6),
        "key_cache must be float32 [num_blocks, block_size, num_kv_heads, 8]",
    ),
    ("paged_attention", "value_cache", f(5, 8, 2, 8), "value_cache must be float32 [5, 4, 2, 8]"),
    ("paged_attention", "block_tables", f(2, 2, dtype=I32), "block_tables must be int32 or int64 [3, max_blocks]"),
    ("paged_attention", "block_tables", f(3, dtype=I32), "got int32 [3] on cpu"),
    ("paged_attention", "context_lens", torch.ones(2, dtype=I32), "context_lens must be int32 or int64 [3] on cpu"),
    ("paged_attention", "sliding_window", 0, "sliding_window must be None or at least 1; got 0"),
    ("paged_prefill_attention", "query_start", torch.arange(4), "query_start must be int32 or int64 [3] on cpu"),
    ("paged_prefill_attention", "context_lens", torch.arange(3), "context_lens must be int32 or int64 [2] on cpu"),
    ("paged_prefill_attention", "sliding_window", -4, "sliding_window must be None or at least 1; got -4"),
    ("paged_prefill_attention", "span", 0, "span must be at least 1; got 0"),
    ("pack_quantized", "matrix", f(5, 8), "matrix must be a QuantizedMatrix; got Tensor"),
    ("pack_quantized", "matrix", quantized(codes=f(5, 4)), "matrix.codes must be float8_e4m3fn or int8 or uint8"),
    (
        "pack_quantized",
        "matrix",
        quantized(scales=f(5, 1)),
        "matrix.scales must be bfloat16 or float16 or float32",
    ),
    ("pack_quantized", "matrix", quantized(group=0), "matrix.group must be at least 1; got 0"),
    ("pack_quantized", "matrix", quantized(offsets=f(5)), "matrix.offsets must be float32 [5, 2] on cpu"),
    ("pack_quantized", "matrix", quantized(table=f(15)), "matrix.table must be float32 [16] on cpu"),
    ("pack_quantized", "matrix", quantized(codes=f(5, 8, dtype=torch.int8)), "a table is for 4-bit codes in uint8"),
    ("pack_quantized", "bias", f(4), "bias must be float32 [5] on cpu"),
    ("pack_quantized", "dtype", I32, "dtype must be bfloat16 or float16 or float32 or float64; got torch.int32"),
    ("attention", "query", f(3, 3, 8), "query's 3 heads must be a multiple of key_cache's 2"),
    ("attention", "key", f(2, 2, 8), "key must be float32 [3, num_kv_heads, 8] on cpu; got float32 [2, 2, 8] on cpu"),
    ("attention", "value", f(3, 2, 7), "value must be float32 [3, 2, 8]"),
    ("attention", "key_cache", f(5, 4, 1, 8), "key_cache must be float32 [num_blocks, block_size, 2, 8] on cpu"),
    ("attention", "metadata", None, "metadata must be an AttentionMetadata; got NoneType"),
    ("attention", "metadata", metadata(slot_mapping=torch.arange(4)), "slot_mapping must be int32 or int64 [3] on cpu"),
    ("attention", "metadata", metadata(block_tables=f(2, dtype=I32)), "block_tables must be"),
    ("attention", "metadata", metadata(context_lens=torch.arange(3)), "context_lens must be int32 or int64 [2]"),
    ("attention", "metadata", metadata(query_start_loc=torch.arange(2)), "query_start_loc must be int32 or int64 [3]"),
    ("attention", "metadata", metadata(num_decodes=2), "prefill_start_loc must be int32 or int64 [1]"),
    ("attention", "metadata", metadata(num_decodes=3), "num_decodes must be from 0 to 2; got 3"),
    ("attention", "metadata", metadata(span=0), "span must be at least 1; got 0"),
    ("attention", "sliding_window", 0, "sliding_window must be None or at least 1; got 0"),
]


def call(op: str, arguments: dict[str, object]) -> object:
    function: Callable[..., object] = getattr(kernels, op)
    return function(**arguments)


@pytest.mark.parametrize("op", kernels.OPS)
def test_the_good_arguments_are_good(op: str) -> None:
    call(op, GOOD[op])


@pytest.mark.parametrize(
    ("op", "name", "value", "says"), BAD, ids=[f"{row[0]}-{row[1]}-{i}" for i, row in enumerate(BAD)]
)
def test_a_bad_argument_is_refused(op: str, name: str, value: object, says: str) -> None:
    with pytest.raises(KernelError, match=re.escape(says)) as caught:
        call(op, {**GOOD[op], name: value})
    assert str(caught.value).startswith(f"{op}: ")
    assert isinstance(caught.value, MiniInferError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("op", "wider"), [("paged_prefill_attention", {"span": 2}), ("attention", {"metadata": metadata(span=2)})]
)
def test_a_sliding_window_is_causal(op: str, wider: dict[str, object]) -> None:
    """Refused in an engine's calls, too, since it is an option of the model and no tensor."""
    for operations in (kernels, kernels.resolve("cpu")):
        with pytest.raises(KernelError, match=r"a sliding window \(4\) needs a causal span of 1; got a span of 2"):
            getattr(operations, op)(**{**GOOD[op], **wider}, sliding_window=4)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (f(5, 2, 2, 4), "kv_scales must be bfloat16 [5, 2, 2, 4] on cpu; got float32 [5, 2, 2, 4] on cpu"),
        (f(5, 2, 4, 2, dtype=torch.bfloat16), "kv_scales must be bfloat16 [5, 2, 2, 4] on cpu"),
        (f(5, 2, 4, 2, dtype=torch.bfloat16).transpose(2, 3), "kv_scales must be contiguous"),
    ],
)
def test_scales_of_codes(scales: torch.Tensor, message: str) -> None:
    cache = f(5, 4, 2, 8, dtype=torch.int8)
    with pytest.raises(KernelError, match=re.escape(message)):
        kernels.write_kv(f(3, 2, 8), f(3, 2, 8), cache, cache.clone(), torch.arange(3), kv_scales=scales)
