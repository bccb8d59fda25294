"""The public operations. Each states its contract, checks its arguments, and hands over to the chosen backend.

Tensors are float64, float32, float16 or bfloat16 unless said otherwise; results have the input's dtype, and arithmetic
happens in float32 or wider. Non-contiguous inputs and zero tokens or sequences are fine. Unusable arguments raise
`KernelError`. Only shapes, dtypes and devices are checked: looking at values would make the host wait for the device,
so indices (positions, slots, block ids that are used) must be right.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from mini_infer.exceptions import KernelError
from mini_infer.kernels.registry import implementation

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_INDICES = frozenset({torch.int32, torch.int64})

_Shape = tuple[int | str | EllipsisType, ...]


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight that `pack_linear` prepared: call it with x `[..., in_features]` for x Wᵀ + b, `[..., out_features]`.

    Attributes:
        multiply: x to x Wᵀ + b, unchecked.
        rows: ids `[N]` to those rows of the weight, `[N, in_features]`; an embedding that is tied to the output layer
            needs no second copy.

    Raises:
        KernelError: x has another dtype, device or number of features.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    multiply: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        fits = isinstance(x, Tensor) and x.dtype is self.dtype and x.device == self.device
        if not fits or x.shape[-1:] != (self.in_features,):
            _check("linear", "x", x, (..., self.in_features), dtypes={self.dtype}, device=self.device)
        return self.multiply(x)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Prepare a weight for many products, in whatever order the backend multiplies it fastest.

        y[..., n] = Σ_k x[..., k] * weight[n, k] + bias[n]        accumulated in float32 or wider, rounded once

    The result may hold a rearranged copy, so let go of the weight if nothing else needs it.

    Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008,
    https://doi.org/10.1145/1356052.1356053

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]`, of weight's dtype; None is zeros.

    Returns:
        A function of x.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    _check("pack_linear", "weight", weight, ("out_features", "in_features"))
    out_features, in_features = weight.shape
    if bias is not None:
        _check("pack_linear", "bias", bias, (out_features,), like=weight)
    multiply, rows = implementation("pack_linear", weight.device)(weight, bias)
    return PackedLinear(in_features, out_features, weight.dtype, weight.device, multiply, rows)


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square layer normalisation.

        y = weight * x / sqrt(mean(x²) + eps)        over the last dimension

    The normalised x is rounded to x's dtype before the weight multiplies it, as in Llama.

    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, https://arxiv.org/abs/1910.07467

    Args:
        x: `[..., hidden_size]`.
        weight: `[hidden_size]`, of x's dtype.
        eps: keeps a row of zeros finite.

    Returns:
        y, of x's shape and dtype.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    _check("rmsnorm", "x", x, (..., "hidden_size"))
    _check("rmsnorm", "weight", weight, (x.shape[-1],), like=x)
    y: Tensor = implementation("rmsnorm", x.device)(x, weight, eps)
    return y


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream and normalise the sum, in one pass over memory.

        total = x + residual
        y = rmsnorm(total, weight, eps)

    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, https://arxiv.org/abs/1910.07467

    Args:
        x: `[..., hidden_size]`, what the layer computed.
        residual: of x's shape and dtype.
        weight: `[hidden_size]`, of x's dtype.
        eps: keeps a row of zeros finite.

    Returns:
        (y, total), both new tensors of x's shape and dtype; total is the next residual.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    _check("add_rmsnorm", "x", x, (..., "hidden_size"))
    _check("add_rmsnorm", "residual", residual, x.shape, like=x)
    _check("add_rmsnorm", "weight", weight, (x.shape[-1],), like=x)
    y: tuple[Tensor, Tensor] = implementation("add_rmsnorm", x.device)(x, residual, weight, eps)
    return y


def apply_rotary_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: turn pairs of features by an angle proportional to the token's position.

        a', b' = a cos - b sin, b cos + a sin        with cos, sin = table[position]

    Pair i is features (i, i + rotary_dim/2) as in Llama, or (2i, 2i + 1) as in GPT-J when `interleaved`. Features
    from rotary_dim on pass through unchanged.

    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, https://arxiv.org/abs/2104.09864

    Args:
        q: `[..., num_heads, head_dim]`.
        k: `[..., num_kv_heads, head_dim]`, of q's leading shape and dtype.
        cos: `[max_positions, rotary_dim / 2]`, any of the floating dtypes; rotary_dim ≤ head_dim.
        sin: of cos's shape and dtype.
        position_ids: int32 or int64, of q's leading shape; each in [0, max_positions).
        interleaved: which features form a pair.

    Returns:
        The turned q and k, as new tensors.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    op = "apply_rotary_emb"
    _check_rotary(op, q, k, cos, sin, position_ids)
    turned: tuple[Tensor, Tensor] = implementation(op, q.device)(q, k, cos, sin, position_ids, interleaved)
    return turned


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise every head of q and k, then turn it by its token's position, in one pass over memory.

        q', k' = apply_rotary_emb(rmsnorm(q, q_weight, eps), rmsnorm(k, k_weight, eps), cos, sin, position_ids)

    Bounding queries and keys bounds the attention scores, which keeps the training of large models stable.

    Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, 2023, https://arxiv.org/abs/2302.05442
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, https://arxiv.org/abs/2104.09864

    Args:
        q: `[..., num_heads, head_dim]`.
        k: `[..., num_kv_heads, head_dim]`, of q's leading shape and dtype.
        q_weight: `[head_dim]`, of q's dtype; the same for all heads.
        k_weight: `[head_dim]`, of q's dtype.
        cos: `[max_positions, rotary_dim / 2]`, any of the floating dtypes; rotary_dim ≤ head_dim.
        sin: of cos's shape and dtype.
        position_ids: int32 or int64, of q's leading shape; each in [0, max_positions).
        eps: keeps a head of zeros finite.
        interleaved: which features form a pair, as in `apply_rotary_emb`.

    Returns:
        The normalised and turned q and k, as new tensors.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    op = "qk_norm_rope"
    _check_rotary(op, q, k, cos, sin, position_ids)
    _check(op, "q_weight", q_weight, (q.shape[-1],), like=q)
    _check(op, "k_weight", k_weight, (q.shape[-1],), like=q)
    turned: tuple[Tensor, Tensor] = implementation(op, q.device)(
        q, k, q_weight, k_weight, cos, sin, position_ids, eps, interleaved
    )
    return turned


def silu_and_mul(x: Tensor) -> Tensor:
    """The gate of a SwiGLU feed-forward layer, on the two projections side by side.

        y = silu(x[..., :I]) * x[..., I:]        silu(z) = z / (1 + exp(-z))

    silu is rounded to x's dtype before the product, as in Llama.

    Shazeer, GLU Variants Improve Transformer, 2020, https://arxiv.org/abs/2002.05202

    Args:
        x: `[..., 2 * I]`, gate then up projection.

    Returns:
        y, `[..., I]`.

    Raises:
        KernelError: x is not a floating tensor with an even last dimension.
    """
    _check("silu_and_mul", "x", x, (..., "2 * I"))
    if x.shape[-1] % 2:
        raise KernelError(f"silu_and_mul: x must have an even last dimension; got {_describe(x)}")
    y: Tensor = implementation("silu_and_mul", x.device)(x)
    return y


def allocate_kv_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str | torch.device,
) -> tuple[Tensor, Tensor]:
    """One layer's paged key and value caches, in the memory order that the chosen backend reads fastest.

    Token t of a sequence lies in slot `(table[t // block_size], t % block_size)`. A backend chooses strides, not the
    shape, so a cache from any backend, or from `torch.zeros`, works with every other.

    Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
    https://arxiv.org/abs/2309.06180

    Args:
        num_blocks: how many blocks; 0 is allowed.
        block_size: tokens per block.
        num_kv_heads: key and value heads.
        head_dim: features per head.
        dtype: of both caches.
        device: of both caches.

    Returns:
        (key_cache, value_cache), each `[num_blocks, block_size, num_kv_heads, head_dim]`; contents are arbitrary.

    Raises:
        KernelError: a size is not positive, or the dtype is none of the floating ones above.
    """
    if num_blocks < 0 or min(block_size, num_kv_heads, head_dim) < 1:
        raise KernelError(
            f"allocate_kv_cache: sizes must be positive; got num_blocks={num_blocks}, block_size={block_size}, "
            f"num_kv_heads={num_kv_heads}, head_dim={head_dim}"
        )
    if dtype not in _FLOATS:
        raise KernelError(f"allocate_kv_cache: dtype must be {_names(_FLOATS)}; got {dtype}")
    device = torch.device(device)
    caches: tuple[Tensor, Tensor] = implementation("allocate_kv_cache", device)(
        num_blocks, block_size, num_kv_heads, head_dim, dtype, device
    )
    return caches


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store new tokens' keys and values in the paged cache, in place.

        key_cache[slot // block_size, slot % block_size] = key        for each slot ≥ 0, and values likewise

    Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
    https://arxiv.org/abs/2309.06180

    Args:
        key: `[num_tokens, num_kv_heads, head_dim]`.
        value: of key's shape and dtype.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, of key's dtype.
        value_cache: of key_cache's shape and dtype.
        slot_mapping: int32 or int64 `[num_tokens]`; -1 means that the token is written nowhere, the others are
            distinct and in [0, num_blocks * block_size).

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    _check("write_kv", "key", key, ("num_tokens", "num_kv_heads", "head_dim"))
    num_tokens, num_kv_heads, head_dim = key.shape
    _check("write_kv", "value", value, key.shape, like=key)
    _check("write_kv", "key_cache", key_cache, ("num_blocks", "block_size", num_kv_heads, head_dim), like=key)
    _check("write_kv", "value_cache", value_cache, key_cache.shape, like=key)
    _check("write_kv", "slot_mapping", slot_mapping, (num_tokens,), dtypes=_INDICES, device=key.device)
    implementation("write_kv", key.device)(key, value, key_cache, value_cache, slot_mapping)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Decode attention: one new token per sequence attends to its whole context through the block table.

        out[h] = Σ_j softmax_j(scale * query[h] · key_j[h // group]) value_j[h // group]

    group = num_heads / num_kv_heads query heads share one KV head; j runs over the context, or over its last
    `sliding_window` tokens. The new token's own key and value are in the cache already and count. Contents of unused
    slots (even NaN) and entries of unused table places (even out of range) never matter.

    Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762
    Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
    https://arxiv.org/abs/2309.06180
    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023, https://arxiv.org/abs/2305.13245

    Args:
        query: `[num_seqs, num_heads, head_dim]`.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, of query's dtype.
        value_cache: of key_cache's shape and dtype.
        block_tables: int32 or int64 `[num_seqs, max_blocks]`.
        context_lens: int32 or int64 `[num_seqs]`, at most max_blocks * block_size; a padding row may say 0 and
            gets zeros.
        scale: of the scores; default head_dim ** -0.5.
        sliding_window: how many of the most recent tokens are visible, the new one included; None is all.

    Returns:
        `[num_seqs, num_heads, head_dim]`.

    Raises:
        KernelError: a shape, dtype, device or option does not fit.
    """
    op = "paged_attention"
    _check(op, "query", query, ("num_seqs", "num_heads", "head_dim"))
    num_seqs, _, head_dim = query.shape
    _check_paged(
        op, query, key_cache, value_cache, (num_seqs, "max_blocks"), block_tables, context_lens, sliding_window
    )
    scale = head_dim**-0.5 if scale is None else scale
    out: Tensor = implementation(op, query.device)(
        query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window
    )
    return out


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Prompt attention: ragged chunks of new tokens attend causally to their contexts through the block tables.

    The formula is that of `paged_attention`. Sequence s owns rows `query_start[s]:query_start[s + 1]` of query; they
    are the last tokens of its context, and the token at position i sees the positions j ≤ i (with a sliding window:
    i - sliding_window < j ≤ i). Their own keys and values, like those of a cached prefix, are in the cache already.
    Contents of unused slots and entries of unused table places never matter.

    Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762
    Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
    https://arxiv.org/abs/2309.06180
    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023, https://arxiv.org/abs/2305.13245

    Args:
        query: `[num_tokens, num_heads, head_dim]`.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, of query's dtype.
        value_cache: of key_cache's shape and dtype.
        block_tables: int32 or int64 `[num_seqs, max_blocks]`.
        context_lens: int32 or int64 `[num_seqs]`, the new tokens included; at most max_blocks * block_size.
        query_start: int32 or int64 `[num_seqs + 1]`, ascending from 0 to num_tokens.
        scale: of the scores; default head_dim ** -0.5.
        sliding_window: how many of the most recent tokens are visible, the token itself included; None is all.

    Returns:
        `[num_tokens, num_heads, head_dim]`.

    Raises:
        KernelError: a shape, dtype, device or option does not fit.
    """
    op = "paged_prefill_attention"
    _check(op, "query", query, ("num_tokens", "num_heads", "head_dim"))
    _check_paged(
        op, query, key_cache, value_cache, ("num_seqs", "max_blocks"), block_tables, context_lens, sliding_window
    )
    num_seqs, head_dim = block_tables.shape[0], query.shape[2]
    _check(op, "query_start", query_start, (num_seqs + 1,), dtypes=_INDICES, device=query.device)
    scale = head_dim**-0.5 if scale is None else scale
    out: Tensor = implementation(op, query.device)(
        query, key_cache, value_cache, block_tables, context_lens, query_start, scale, sliding_window
    )
    return out


def argmax_logprob(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row and its log probability, in one pass over the vocabulary.

        i = argmax_j z_j        logprob = z_i - log Σ_j exp(z_j)

    Args:
        logits: `[num_rows, vocab_size]`, vocab_size ≥ 1.

    Returns:
        i, int64 `[num_rows]`, the first of equals; logprob `[num_rows]`, float64 for float64 logits, else float32. A
        row that holds NaN has logprob NaN and an arbitrary i within the vocabulary.

    Raises:
        KernelError: logits is no floating matrix, or the vocabulary is empty.
    """
    _check("argmax_logprob", "logits", logits, ("num_rows", "vocab_size"))
    if logits.shape[1] == 0:
        raise KernelError(f"argmax_logprob: logits must have a vocabulary; got {_describe(logits)}")
    result: tuple[Tensor, Tensor] = implementation("argmax_logprob", logits.device)(logits)
    return result


def _check_rotary(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    _check(op, "q", q, (..., "num_heads", "head_dim"))
    leading, head_dim = q.shape[:-2], q.shape[-1]
    _check(op, "k", k, (*leading, "num_kv_heads", head_dim), like=q)
    _check(op, "cos", cos, ("max_positions", "rotary_dim / 2"), device=q.device)
    if 2 * cos.shape[1] > head_dim:
        raise KernelError(f"{op}: cos turns {2 * cos.shape[1]} features but q has head_dim {head_dim}")
    _check(op, "sin", sin, cos.shape, like=cos)
    _check(op, "position_ids", position_ids, leading, dtypes=_INDICES, device=q.device)


def _check_paged(
    op: str,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables_shape: _Shape,
    block_tables: Tensor,
    context_lens: Tensor,
    sliding_window: int | None,
) -> None:
    device, num_heads, head_dim = query.device, query.shape[1], query.shape[2]
    _check(op, "key_cache", key_cache, ("num_blocks", "block_size", "num_kv_heads", head_dim), like=query)
    _check(op, "value_cache", value_cache, key_cache.shape, like=query)
    _check(op, "block_tables", block_tables, tables_shape, dtypes=_INDICES, device=device)
    _check(op, "context_lens", context_lens, (block_tables.shape[0],), dtypes=_INDICES, device=device)
    num_kv_heads = key_cache.shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise KernelError(
            f"{op}: query's {num_heads} heads must be a multiple of key_cache's {num_kv_heads}; "
            f"got query {_describe(query)}, key_cache {_describe(key_cache)}"
        )
    if sliding_window is not None and sliding_window < 1:
        raise KernelError(f"{op}: sliding_window must be None or at least 1; got {sliding_window}")


def _check(
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
    raise KernelError(f"{op}: {name} must be {_names(dtypes)} [{sizes}]{place}; got {_describe(tensor)}")


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


def _describe(tensor: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{_names({tensor.dtype})} {list(tensor.shape)} on {tensor.device}"
