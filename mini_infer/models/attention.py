"""A layer's first slot: grouped-query attention over the paged cache."""

import torch
from torch import Tensor, nn

from mini_infer.kernels import AttentionMetadata, Kernels
from mini_infer.models.config import AttentionConfig
from mini_infer.models.linear import Linear, Norm

KVCache = tuple[Tensor, Tensor]
"""One layer's key and value cache, as `allocate_kv_cache` made them; only kernels look inside."""

RotaryTables = tuple[Tensor, Tensor]
"""(cos, sin) of every angle, each ``[max_positions, head_dim // 2]``."""


class Attention(nn.Module):
    """One projection for queries, keys and values; H query heads and K key-value heads with D features each.

    Args:
        hidden_size: width of what comes in and goes out.
        config: all else about its shape.
        eps: of its norms.
        rotary: the tables of ``config.rope``; None where that is None.
        dtype: of the parameters.
        kernels: who computes.
    """

    def __init__(
        self,
        hidden_size: int,
        config: AttentionConfig,
        eps: float,
        rotary: RotaryTables | None,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.config, self.rotary, self.kernels = config, rotary, kernels
        self.head_counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        widths = [heads * config.head_dim for heads in self.head_counts]
        self.qkv_proj = Linear(hidden_size, widths, config.qkv_bias, dtype, kernels)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            q_size, k_size = (config.head_dim, config.head_dim) if config.qk_norm == "head" else widths[:2]
            self.q_norm = Norm(q_size, eps, dtype, kernels)
            self.k_norm = Norm(k_size, eps, dtype, kernels)
        self.o_proj = Linear(widths[0], [hidden_size], config.output_bias, dtype, kernels)

    def forward(self, hidden: Tensor, positions: Tensor, metadata: AttentionMetadata, kv_cache: KVCache) -> Tensor:
        """``[T, hidden_size]`` to ``[T, hidden_size]``."""
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.config.head_dim))
        query, key, value = heads.split(self.head_counts, dim=1)  # [T, H, D], [T, K, D], [T, K, D]
        query, key = self._normed_and_turned(query, key, positions)
        attended = self.kernels.attention(
            query, key, value, *kv_cache, metadata, sliding_window=self.config.sliding_window
        )
        return self.o_proj(attended.flatten(1))

    def _normed_and_turned(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after whatever this layer does to them before they meet."""
        if self.q_norm is not None and self.k_norm is not None:
            if self.config.qk_norm == "head" and self.rotary is not None:  # both in one pass over memory
                weights = self.q_norm.weight, self.k_norm.weight
                return self.kernels.qk_norm_rope(query, key, *weights, *self.rotary, positions, self.q_norm.eps)
            query, key = (
                norm(heads.flatten(1).unflatten(-1, (-1, len(norm.weight)))).view(heads.shape)
                for norm, heads in ((self.q_norm, query), (self.k_norm, key))
            )
        if self.rotary is not None:
            query, key = self.kernels.apply_rotary_emb(query, key, *self.rotary, positions)
        return query, key
