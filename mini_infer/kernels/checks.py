"""What calls by hand are checked for, operation by operation; each check returns the device that the call runs on."""

from collections.abc import Callable, Set
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mini_infer.exceptions import KernelError
from mini_infer.kernels.attention import AttentionMetadata
from mini_infer.kernels.host import Floats, Ints
from mini_infer.kernels.quantized import ROTATED, QuantizedMatrix

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_SCALES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CODES = frozenset({torch.int8, torch.uint8, torch.float8_e4m3fn})
_CACHE_CODES = frozenset({torch.int8, torch.float8_e4m3fn})
_INDICES = frozenset({torch.int32, torch.int64})

_Shape = tuple[int | str | EllipsisType, ...]


def check(
    op: str,
    name: str,
    tensor: Tensor,
    shape: _Shape,
    *,
    like: Tensor | None = None,
    dtypes: Set[torch.dtype] = _FLOATS,
    device: torch.device | None = None,
) -> None:
    """Raise unless `tensor` has `shape`, and the dtype and device of `like`, or one of `dtypes` and `device`.

    A string in `shape` names a size that may be anything; a leading `...` any number of such sizes.
    """
    if like is not None:
        dtypes, device = {like.dtype}, like.device
    if (
        isinstance(tensor, Tensor)
        and _fits(tensor.shape, shape)
        and tensor.dtype in dtypes
        and (device is None or tensor.device == device)
    ):
        return
    sizes = ", ".join("..." if size is ... else str(size) for size in shape)
    place = "" if device is None else f" on {device}"
    raise KernelError(f"{op}: {name} must be {_names(dtypes)} [{sizes}]{place}; got {describe(tensor)}")


def _fits(actual: torch.Size, expected: _Shape) -> bool:
    if actual == expected:
        return True
    if expected and expected[0] is ...:
        expected = expected[1:]
        actual = actual[-len(expected) :]
    if len(actual) != len(expected):
        return False
    for n, size in zip(actual, expected, strict=True):  # noqa: SIM110  (a generator takes twice as long)
        if n != size and not isinstance(size, str):
            return False
    return True


def _names(dtypes: Set[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def describe(tensor: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{_names({tensor.dtype})} {list(tensor.shape)} on {tensor.device}"


def _rmsnorm(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> torch.device:
    check("rmsnorm", "x", x, (..., "hidden_size"))
    check("rmsnorm", "weight", weight, (x.shape[-1],), like=x)
    return x.device


def _add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, *_: Any, **__: Any) -> torch.device:
    check("add_rmsnorm", "x", x, (..., "hidden_size"))
    check("add_rmsnorm", "residual", residual, x.shape, like=x)
    check("add_rmsnorm", "weight", weight, (x.shape[-1],), like=x)
    return x.device


def _apply_rotary_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *, interleaved: bool = False
) -> torch.device:
    return _rotary("apply_rotary_emb", q, k, cos, sin, position_ids, interleaved)


def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    *_: Any,
    interleaved: bool = False,
    **__: Any,
) -> torch.device:
    op = "qk_norm_rope"
    device = _rotary(op, q, k, cos, sin, position_ids, interleaved)
    check(op, "q_weight", q_weight, (q.shape[-1],), like=q)
    check(op, "k_weight", k_weight, (q.shape[-1],), like=q)
    return device


def _rotary(
    op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool
) -> torch.device:
    check(op, "q", q, (..., "num_heads", "head_dim"))
    leading, head_dim = q.shape[:-2], q.shape[-1]
    check(op, "k", k, (*leading, "num_kv_heads", head_dim), like=q)
    check(op, "cos", cos, ("max_positions", "rotary_dim / 2"), device=q.device)
    width = cos.shape[1]
    narrow = 2 * width <= head_dim
    if not narrow and (width != head_dim or head_dim % 2):
        raise KernelError(
            f"{op}: cos turns {2 * width} features but q has head_dim {head_dim}; its width must be rotary_dim / 2, or "
            "head_dim with both features of a pair alike"
        )
    check(op, "sin", sin, cos.shape, like=cos)
    check(op, "position_ids", position_ids, leading, dtypes=_INDICES, device=q.device)
    if narrow:
        return q.device
    # The one look at values: such a table in the other style's order would turn the wrong features, silently.
    for name, table in (("cos", cos[position_ids]), ("sin", sin[position_ids])):
        halves = (table[..., 0::2], table[..., 1::2]) if interleaved else table.chunk(2, dim=-1)
        if not torch.equal(*halves):
            pair = "2i and 2i + 1" if interleaved else f"i and i + {head_dim // 2}"
            raise KernelError(
                f"{op}: columns {pair} of {name} must be equal for interleaved={interleaved}, since they turn one pair "
                f"of features; got {describe(table)} in which they differ"
            )
    return q.device


def _silu_and_mul(x: Tensor) -> torch.device:
    check("silu_and_mul", "x", x, (..., "2 * I"))
    if x.shape[-1] % 2:
        raise KernelError(f"silu_and_mul: x must have an even last dimension; got {describe(x)}")
    return x.device


def _allocate_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str | torch.device
) -> torch.device:
    if num_blocks < 0 or min(block_size, num_kv_heads, head_dim) < 1:
        raise KernelError(
            f"allocate_kv_cache: sizes must be positive; got num_blocks={num_blocks}, block_size={block_size}, "
            f"num_kv_heads={num_kv_heads}, head_dim={head_dim}"
        )
    if dtype not in _FLOATS | _CACHE_CODES:
        raise KernelError(f"allocate_kv_cache: dtype must be {_names(_FLOATS | _CACHE_CODES)}; got {dtype}")
    return torch.device(device)


def _write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scales: Tensor | None = None,
    op: str = "write_kv",
) -> torch.device:
    check(op, "key", key, ("num_tokens", "num_kv_heads", "head_dim"))
    num_tokens, num_kv_heads, head_dim = key.shape
    check(op, "value", value, key.shape, like=key)
    _caches(op, key, key_cache, value_cache, kv_scales, ("num_blocks", "block_size", num_kv_heads, head_dim))
    check(op, "slot_mapping", slot_mapping, (num_tokens,), dtypes=_INDICES, device=key.device)
    return key.device


def _paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    kv_scales: Tensor | None = None,
) -> torch.device:
    op = "paged_attention"
    check(op, "query", query, ("num_seqs", "num_heads", "head_dim"))
    caches, shape = (key_cache, value_cache, kv_scales), (len(query), "max_blocks")
    _paged(op, query, caches, shape, block_tables, context_lens, sliding_window, 1)
    return query.device


def _paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    span: int = 1,
    kv_scales: Tensor | None = None,
) -> torch.device:
    op = "paged_prefill_attention"
    check(op, "query", query, ("num_tokens", "num_heads", "head_dim"))
    caches, shape = (key_cache, value_cache, kv_scales), ("num_seqs", "max_blocks")
    _paged(op, query, caches, shape, block_tables, context_lens, sliding_window, span)
    check(op, "query_start", query_start, (len(block_tables) + 1,), dtypes=_INDICES, device=query.device)
    return query.device


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    kv_scales: Tensor | None = None,
) -> torch.device:
    op = "attention"
    if not isinstance(metadata, AttentionMetadata):
        raise KernelError(f"{op}: metadata must be an AttentionMetadata; got {type(metadata).__name__}")
    check(op, "query", query, ("num_tokens", "num_heads", "head_dim"))
    num_tokens, _, head_dim = query.shape
    check(op, "key", key, (num_tokens, "num_kv_heads", head_dim), like=query)
    _write_kv(key, value, key_cache, value_cache, metadata.slot_mapping, kv_scales=kv_scales, op=op)
    tables, lengths, n = metadata.block_tables, metadata.context_lens, metadata.num_decodes
    caches, shape = (key_cache, value_cache, kv_scales), ("num_seqs", "max_blocks")
    _paged(op, query, caches, shape, tables, lengths, sliding_window, metadata.span)
    num_seqs = len(tables)
    if not 0 <= n <= min(num_seqs, num_tokens):
        raise KernelError(f"{op}: num_decodes must be from 0 to {min(num_seqs, num_tokens)}; got {n}")
    for name, size in (("query_start_loc", num_seqs + 1), ("prefill_start_loc", num_seqs - n + 1)):
        check(op, name, getattr(metadata, name), (size,), dtypes=_INDICES, device=query.device)
    return query.device


def _paged(
    op: str,
    query: Tensor,
    caches: tuple[Tensor, Tensor, Tensor | None],
    tables_shape: _Shape,
    block_tables: Tensor,
    context_lens: Tensor,
    sliding_window: int | None,
    span: int,
) -> None:
    device, num_heads, head_dim = query.device, query.shape[1], query.shape[2]
    key_cache = caches[0]
    _caches(op, query, *caches, ("num_blocks", "block_size", "num_kv_heads", head_dim))
    check(op, "block_tables", block_tables, tables_shape, dtypes=_INDICES, device=device)
    check(op, "context_lens", context_lens, (block_tables.shape[0],), dtypes=_INDICES, device=device)
    num_kv_heads = key_cache.shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise KernelError(
            f"{op}: query's {num_heads} heads must be a multiple of key_cache's {num_kv_heads}; "
            f"got query {describe(query)}, key_cache {describe(key_cache)}"
        )
    if sliding_window is not None and sliding_window < 1:
        raise KernelError(f"{op}: sliding_window must be None or at least 1; got {sliding_window}")
    if span < 1:
        raise KernelError(f"{op}: span must be at least 1; got {span}")


def _caches(
    op: str, like: Tensor, key_cache: Tensor, value_cache: Tensor, kv_scales: Tensor | None, shape: _Shape
) -> None:
    dtypes = {like.dtype} if kv_scales is None else _CACHE_CODES
    check(op, "key_cache", key_cache, shape, dtypes=dtypes, device=like.device)
    check(op, "value_cache", value_cache, key_cache.shape, like=key_cache)
    if kv_scales is None:
        return
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    wanted = (num_blocks, num_kv_heads, 2, block_size)
    check(op, "kv_scales", kv_scales, wanted, dtypes={torch.bfloat16}, device=like.device)
    if not kv_scales.is_contiguous():
        raise KernelError(f"{op}: kv_scales must be contiguous, as allocate_kv_cache makes it")


def _pack_linear(weight: Tensor, bias: Tensor | None = None) -> torch.device:
    check("pack_linear", "weight", weight, ("out_features", "in_features"))
    if bias is not None:
        check("pack_linear", "bias", bias, (weight.shape[0],), like=weight)
    return weight.device


def _pack_quantized(matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> torch.device:
    op = "pack_quantized"
    if not isinstance(matrix, QuantizedMatrix):
        raise KernelError(f"{op}: matrix must be a QuantizedMatrix; got {type(matrix).__name__}")
    check(op, "matrix.codes", matrix.codes, ("out_features", "width"), dtypes=_CODES)
    (outputs, inputs), device = matrix.shape, matrix.codes.device
    if matrix.group < 1:
        raise KernelError(f"{op}: matrix.group must be at least 1; got {matrix.group}")
    check(op, "matrix.scales", matrix.scales, (outputs, -(-inputs // matrix.group)), dtypes=_SCALES, device=device)
    if matrix.offsets is not None:
        check(op, "matrix.offsets", matrix.offsets, matrix.scales.shape, like=matrix.scales)
    if matrix.table is not None:
        check(op, "matrix.table", matrix.table, (16,), dtypes={torch.float32}, device=device)
        if matrix.codes.dtype is not torch.uint8:
            raise KernelError(f"{op}: a table is for 4-bit codes in uint8; got codes {describe(matrix.codes)}")
    if matrix.rotated and inputs % ROTATED:
        raise KernelError(f"{op}: what is rotated has a multiple of {ROTATED} inputs; got {inputs}")
    if dtype not in _FLOATS:
        raise KernelError(f"{op}: dtype must be {_names(_FLOATS)}; got {dtype}")
    if bias is not None:
        check(op, "bias", bias, (outputs,), dtypes={dtype}, device=device)
    return device


def _argmax_logprob(logits: Tensor) -> torch.device:
    check("argmax_logprob", "logits", logits, ("num_rows", "vocab_size"))
    if logits.shape[1] == 0:
        raise KernelError(f"argmax_logprob: logits must have a vocabulary; got {describe(logits)}")
    return logits.device


def _draw_tokens(
    logits: Tensor, temperature: Floats, top_k: Ints, top_p: Floats, min_p: Floats, uniform: Floats
) -> torch.device:
    check("draw_tokens", "logits", logits, ("num_rows", "vocab_size"))
    if logits.shape[1] == 0:
        raise KernelError(f"draw_tokens: logits must have a vocabulary; got {describe(logits)}")
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    for name, array in parameters.items():
        dtype = np.int64 if name == "top_k" else np.float64
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (len(logits),):
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise KernelError(f"draw_tokens: {name} must be a {dtype.__name__} array [{len(logits)}]; got {got}")
    return logits.device


CHECKS: dict[str, Callable[..., torch.device]] = {
    "rmsnorm": _rmsnorm,
    "add_rmsnorm": _add_rmsnorm,
    "apply_rotary_emb": _apply_rotary_emb,
    "qk_norm_rope": _qk_norm_rope,
    "silu_and_mul": _silu_and_mul,
    "allocate_kv_cache": _allocate_kv_cache,
    "write_kv": _write_kv,
    "paged_attention": _paged_attention,
    "paged_prefill_attention": _paged_prefill_attention,
    "attention": _attention,
    "pack_linear": _pack_linear,
    "pack_quantized": _pack_quantized,
    "argmax_logprob": _argmax_logprob,
    "draw_tokens": _draw_tokens,
}
"""The check of each operation there is."""
