"""The operations: what each one promises, whoever performs it.

Tensors are float64, float32, float16 or bfloat16 unless said otherwise; results have the input's dtype, and arithmetic
happens in float32 or wider. Non-contiguous inputs and zero tokens or sequences are fine.

There are two ways to call them. By hand, `kernels.rmsnorm(x, weight)`: the implementation is looked up at each call,
and unusable arguments raise `KernelError`. Only shapes, dtypes and devices are checked: looking at values would make
the host wait for the device, so indices (positions, slots, block ids that are used) must be right. An engine instead
resolves its `Kernels` once, and its calls go straight to the implementations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mini_infer.exceptions import KernelError
from mini_infer.kernels.attention import AttentionMetadata
from mini_infer.kernels.host import Floats, Ints
from mini_infer.kernels.packed_linear import PackedLinear
from mini_infer.kernels.quantized import QuantizedMatrix


@dataclass(frozen=True, eq=False)
class Operations:
    """The operations, performed by `functions`.

    Attributes:
        functions: for each operation what performs it, and takes all its arguments by position.
    """

    functions: Mapping[str, Callable[..., Any]]

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
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
        """
        multiply, rows = self.functions["pack_linear"](weight, bias)
        out_features, in_features = weight.shape
        return PackedLinear(in_features, out_features, weight.dtype, weight.device, multiply, rows)

    def pack_quantized(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        """Prepare a quantised weight for many products with x of `dtype`.

            y[..., n] = Σ_k x[..., k] * value[n, k] + bias[n]        value as `QuantizedMatrix` defines it

        accumulated in float32 or wider and rounded once. For float16 and bfloat16 a backend may round x to 8 bits, too,
        with a scale for each token and at most 128 neighbouring inputs: to integers, which costs about 0.6 % of the
        result, or beside float8 codes to float8, about 3 %. It may keep scales in float16, and so give `rows` that are
        off by a rounding. For wider x nothing is rounded. The result may hold a rearranged copy, so let go of the
        matrix if nothing else needs it.

        Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022,
        https://arxiv.org/abs/2208.07339

        Args:
            matrix: `[out_features, in_features]`, in few bits.
            bias: `[out_features]`, of `dtype`; None is zeros.
            dtype: of x, the result and `rows`.

        Returns:
            A function of x.
        """
        multiply, rows = self.functions["pack_quantized"](matrix, bias, dtype)
        out_features, in_features = matrix.shape
        return PackedLinear(in_features, out_features, dtype, matrix.codes.device, multiply, rows)

    def rmsnorm(self, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
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
        """
        return self.functions["rmsnorm"](x, weight, eps)

    def add_rmsnorm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
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
        """
        return self.functions["add_rmsnorm"](x, residual, weight, eps)

    def apply_rotary_emb(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rotary position embedding: turn pairs of features by an angle proportional to the token's position.

            a', b' = a cos - b sin, b cos + a sin        with cos, sin = table[position]

        Pair i is features (i, i + rotary_dim/2) as in Llama, or (2i, 2i + 1) as in GPT-J when `interleaved`. Features
        from rotary_dim on pass through unchanged.

        Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, https://arxiv.org/abs/2104.09864

        Args:
            q: `[..., num_heads, head_dim]`.
            k: `[..., num_kv_heads, head_dim]`, of q's leading shape and dtype.
            cos: `[max_positions, rotary_dim / 2]`, any of the floating dtypes; rotary_dim ≤ head_dim. Or
                `[max_positions, head_dim]` with a column for each feature, as transformers has them: rotary_dim is then
                head_dim, and both features of a pair have the same column.
            sin: of cos's shape and dtype.
            position_ids: int32 or int64, of q's leading shape; each in [0, max_positions).
            interleaved: which features form a pair.

        Returns:
            The turned q and k, as new tensors.
        """
        cos, sin = _of_pairs(cos, q, interleaved), _of_pairs(sin, q, interleaved)
        return self.functions["apply_rotary_emb"](q, k, cos, sin, position_ids, interleaved)

    def qk_norm_rope(
        self,
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
            cos: `[max_positions, rotary_dim / 2]`, any of the floating dtypes; rotary_dim ≤ head_dim. Or
                `[max_positions, head_dim]` with a column for each feature, as transformers has them: rotary_dim is then
                head_dim, and both features of a pair have the same column.
            sin: of cos's shape and dtype.
            position_ids: int32 or int64, of q's leading shape; each in [0, max_positions).
            eps: keeps a head of zeros finite.
            interleaved: which features form a pair, as in `apply_rotary_emb`.

        Returns:
            The normalised and turned q and k, as new tensors.
        """
        cos, sin = _of_pairs(cos, q, interleaved), _of_pairs(sin, q, interleaved)
        return self.functions["qk_norm_rope"](q, k, q_weight, k_weight, cos, sin, position_ids, eps, interleaved)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """The gate of a SwiGLU feed-forward layer, on the two projections side by side.

            y = silu(x[..., :I]) * x[..., I:]        silu(z) = z / (1 + exp(-z))

        silu is rounded to x's dtype before the product, as in Llama.

        Shazeer, GLU Variants Improve Transformer, 2020, https://arxiv.org/abs/2002.05202

        Args:
            x: `[..., 2 * I]`, gate then up projection.

        Returns:
            y, `[..., I]`.
        """
        return self.functions["silu_and_mul"](x)

    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> tuple[Tensor, ...]:
        """One layer's paged key and value caches, in the memory order that the chosen backend reads fastest.

        Token t of a sequence lies in slot `(table[t // block_size], t % block_size)`. A backend chooses strides, not
        the shape, so a cache from any backend, or from `torch.zeros`, works with every other.

        A cache of 8 bits holds codes, and beside it lies a scale for each token and head:

            key = key_cache * kv_scales[block, head, 0, offset]        and values likewise, with 1 in place of 0

        Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
        https://arxiv.org/abs/2309.06180

        Args:
            num_blocks: how many blocks; 0 is allowed.
            block_size: tokens per block.
            num_kv_heads: key and value heads.
            head_dim: features per head.
            dtype: of both caches; int8 and float8_e4m3fn are codes.
            device: of both caches.

        Returns:
            (key_cache, value_cache), each `[num_blocks, block_size, num_kv_heads, head_dim]`; for codes
            (key_cache, value_cache, kv_scales) with kv_scales bfloat16 `[num_blocks, num_kv_heads, 2, block_size]`.
            Contents are arbitrary.
        """
        caches = self.functions["allocate_kv_cache"](
            num_blocks, block_size, num_kv_heads, head_dim, dtype, torch.device(device)
        )
        if dtype.itemsize > 1:
            return caches
        return *caches, torch.empty((num_blocks, num_kv_heads, 2, block_size), dtype=torch.bfloat16, device=device)

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        *,
        kv_scales: Tensor | None = None,
    ) -> None:
        """Store new tokens' keys and values in the paged cache, in place.

            key_cache[slot // block_size, slot % block_size] = key        for each slot ≥ 0, and values likewise

        As codes of 8 bits, in float32, with L = 127 for int8 and 448 for float8_e4m3fn:

            scale = bfloat16(max|key| / L)        code = round(key * (1 / scale))        for each token and head

        A scale below 1e-37 makes all codes 0, and a key that is not finite makes NaN of all that is read there.

        Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
        https://arxiv.org/abs/2309.06180

        Args:
            key: `[num_tokens, num_kv_heads, head_dim]`.
            value: of key's shape and dtype.
            key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, of key's dtype, or codes.
            value_cache: of key_cache's shape and dtype.
            slot_mapping: int32 or int64 `[num_tokens]`; -1 means that the token is written nowhere, the others are
                distinct and in [0, num_blocks * block_size).
            kv_scales: of codes, as `allocate_kv_cache` makes it.
        """
        self.functions["write_kv"](key, value, key_cache, value_cache, slot_mapping, *_given(kv_scales))

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """Decode attention: one new token per sequence attends to its whole context through the block table.

            out[h] = Σ_j softmax_j(scale * query[h] · key_j[h // group]) value_j[h // group]

        group = num_heads / num_kv_heads query heads share one KV head; j runs over the context, or over its last
        `sliding_window` tokens. The new token's own key and value are in the cache already and count. Contents of
        unused slots (even NaN) and entries of unused table places (even out of range) never matter.

        Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762
        Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
        https://arxiv.org/abs/2309.06180
        Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023, https://arxiv.org/abs/2305.13245

        Args:
            query: `[num_seqs, num_heads, head_dim]`.
            key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, of query's dtype, or codes.
            value_cache: of key_cache's shape and dtype.
            block_tables: int32 or int64 `[num_seqs, max_blocks]`.
            context_lens: int32 or int64 `[num_seqs]`, at most max_blocks * block_size; a padding row may say 0 and
                gets zeros.
            scale: of the scores; default head_dim ** -0.5.
            sliding_window: how many of the most recent tokens are visible, the new one included; None is all.
            kv_scales: of codes, as `allocate_kv_cache` makes it.

        Returns:
            `[num_seqs, num_heads, head_dim]`.
        """
        scale = query.shape[2] ** -0.5 if scale is None else scale
        return self.functions["paged_attention"](
            query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window, *_given(kv_scales)
        )

    def paged_prefill_attention(
        self,
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
    ) -> Tensor:
        """Prompt attention: ragged chunks of new tokens attend to their contexts through the block tables.

        The formula is that of `paged_attention`. Sequence s owns rows `query_start[s]:query_start[s + 1]` of query;
        they are the last tokens of its context, and the token at position i sees the positions

            j < min(context_len, (i // span + 1) * span)

        With a span of 1 that is j ≤ i: causal (with a sliding window: i - sliding_window < j ≤ i). A longer span cuts
        the sequence into blocks of so many tokens that see each other and all before them, and one of at least the
        context's length lets every token see every other, as masked diffusion models want it. The new tokens' own keys
        and values, like those of a cached prefix, are in the cache already. Contents of unused slots and entries of
        unused table places never matter.

        Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762
        Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023,
        https://arxiv.org/abs/2309.06180
        Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023, https://arxiv.org/abs/2305.13245

        Args:
            query: `[num_tokens, num_heads, head_dim]`.
            key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, of query's dtype, or codes.
            value_cache: of key_cache's shape and dtype.
            block_tables: int32 or int64 `[num_seqs, max_blocks]`.
            context_lens: int32 or int64 `[num_seqs]`, the new tokens included; at most max_blocks * block_size.
            query_start: int32 or int64 `[num_seqs + 1]`, ascending from 0 to num_tokens.
            scale: of the scores; default head_dim ** -0.5.
            sliding_window: how many of the most recent tokens are visible, the token itself included; None is all. Only
                with a span of 1.
            span: how many neighbouring tokens, counted from the sequence's first, see each other; at least 1.
            kv_scales: of codes, as `allocate_kv_cache` makes it.

        Returns:
            `[num_tokens, num_heads, head_dim]`.
        """
        _refuse_window(span, sliding_window)
        scale = query.shape[2] ** -0.5 if scale is None else scale
        arguments = query, key_cache, value_cache, block_tables, context_lens, query_start
        return self.functions["paged_prefill_attention"](*arguments, scale, sliding_window, span, *_given(kv_scales))

    def attention(
        self,
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
    ) -> Tensor:
        """One layer's attention for a whole step: write the new keys and values, then attend to what is cached.

        Decodes and prompt chunks ride in one batch, the decodes first. Unless a backend has this operation of its own,
        it is `write_kv`, then `paged_attention` of the leading decodes and `paged_prefill_attention` of the rest. All
        new tokens are written before any is attended to.

        Args:
            query: `[num_tokens, num_heads, head_dim]`.
            key: `[num_tokens, num_kv_heads, head_dim]`, of query's dtype.
            value: of key's shape and dtype.
            key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, of query's dtype, or codes.
            value_cache: of key_cache's shape and dtype.
            metadata: which token belongs to which sequence, where it is written and what it sees.
            scale: of the scores; default head_dim ** -0.5.
            sliding_window: how many of the most recent tokens are visible, the token itself included; None is all. Only
                with a span of 1.
            kv_scales: of codes, as `allocate_kv_cache` makes it.

        Returns:
            `[num_tokens, num_heads, head_dim]`.
        """
        _refuse_window(metadata.span, sliding_window)
        scale = query.shape[2] ** -0.5 if scale is None else scale
        arguments = query, key, value, key_cache, value_cache, metadata
        return self.functions["attention"](*arguments, scale, sliding_window, *_given(kv_scales))

    def argmax_logprob(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row and its log probability, in one pass over the vocabulary.

            i = argmax_j z_j        logprob = z_i - log Σ_j exp(z_j)

        Args:
            logits: `[num_rows, vocab_size]`, vocab_size ≥ 1.

        Returns:
            i, int64 `[num_rows]`, the first of equals; logprob `[num_rows]`, float64 for float64 logits, else float32.
            A row that holds NaN has logprob NaN and an arbitrary i within the vocabulary.
        """
        return self.functions["argmax_logprob"](logits)

    def draw_tokens(
        self, logits: Tensor, temperature: Floats, top_k: Ints, top_p: Floats, min_p: Floats, uniform: Floats
    ) -> Tensor:
        """A token of each row, at random: the filters in this order, then the cumulative sum inverted.

            w_j = exp((z_j - max z) / temperature)
            w_j = 0 unless z_j is among the top_k largest, or equals the last of them
            w_j = 0 unless the larger weights together make less than top_p of all that is left
            w_j = 0 if it is less than min_p times the largest
            i = the first whose w_0 + ... + w_i exceeds uniform · Σ w

        The parameters are on the host, whatever the logits' device: what they are decides what there is to compute.

        Holtzman et al., The Curious Case of Neural Text Degeneration (top-p), 2019, https://arxiv.org/abs/1904.09751
        Nguyen et al., Turning Up the Heat: Min-p Sampling, 2024, https://arxiv.org/abs/2407.01082

        Args:
            logits: `[num_rows, vocab_size]`, vocab_size ≥ 1.
            temperature: `[num_rows]`, above 0.
            top_k: `[num_rows]`; below 1 keeps all.
            top_p: `[num_rows]`; 0 leaves the likeliest token, 1 all. Of tokens as likely as the last that stays, the
                first stay; on a GPU all do, where telling them apart would take a wait.
            min_p: `[num_rows]`; 0 keeps all.
            uniform: `[num_rows]`, in [0, 1).

        Returns:
            i, int64 `[num_rows]`. Of a row that holds NaN, an arbitrary i within the vocabulary.
        """
        return self.functions["draw_tokens"](logits, temperature, top_k, top_p, min_p, uniform)


def _of_pairs(table: Tensor, q: Tensor, interleaved: bool) -> Tensor:
    """A table's columns for the pairs of features, where it has one for each feature."""
    if 2 * table.shape[1] <= q.shape[-1]:
        return table
    return table[:, 0::2] if interleaved else table[:, : table.shape[1] // 2]


def _given(kv_scales: Tensor | None) -> tuple[Tensor, ...]:
    """An implementation's last argument, which one that knows no codes need not have."""
    return () if kv_scales is None else (kv_scales,)


def _refuse_window(span: int, sliding_window: int | None) -> None:
    if span > 1 and sliding_window is not None:
        raise KernelError(f"a sliding window ({sliding_window}) needs a causal span of 1; got a span of {span}")
