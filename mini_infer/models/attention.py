"""A layer's first slot: grouped-query attention over the paged cache."""

import torch
from torch import Tensor, nn

from mini_infer.kernels import AttentionMetadata, Kernels
from mini_infer.models.batch import Batch, KVCache, Whole
from mini_infer.models.config import AttentionConfig
from mini_infer.models.keeping import select
from mini_infer.models.linear import Linear, Norm
from mini_infer.parallel.share import WHOLE, Share
from mini_infer.parallel.slices import whole

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
        share: which of the heads it has; what they give is summed over all that share them.
    """

    def __init__(
        self,
        hidden_size: int,
        config: AttentionConfig,
        eps: float,
        rotary: RotaryTables | None,
        dtype: torch.dtype,
        kernels: Kernels,
        share: Share = WHOLE,
    ) -> None:
        super().__init__()
        self.config, self.rotary, self.kernels, self.group = config, rotary, kernels, share.group
        heads, kv_heads = share.heads(config.num_heads), share.kv_heads(config.num_kv_heads)
        self.head_counts = (len(heads), len(kv_heads), len(kv_heads))
        widths = [span.times(config.head_dim) for span in (heads, kv_heads, kv_heads)]
        self.qkv_proj = Linear(hidden_size, widths, config.qkv_bias, dtype, kernels)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            q_size, k_size = 2 * [whole(config.head_dim)] if config.qk_norm == "head" else widths[:2]
            self.q_norm = Norm(q_size, eps, dtype, kernels)
            self.k_norm = Norm(k_size, eps, dtype, kernels)
        # What every rank would add is added once.
        self.o_proj = Linear(widths[0], [hidden_size], config.output_bias and share.group.rank == 0, dtype, kernels)

    def forward(self, hidden: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        """``[T, hidden_size]`` to ``[T, hidden_size]``."""
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.config.head_dim))
        query, key, value = heads.split(self.head_counts, dim=1)  # [T, H, D], [T, K, D], [T, K, D]
        query, key = self._normed_and_turned(query, key, batch.positions)
        if batch.whole is None:
            attended = self._attend(query, key, value, batch.attention, kv_cache)
        else:
            attended = self._attend_whole(query, key, value, batch, batch.whole, kv_cache)
        return self.group.sum(self.o_proj(attended.flatten(1)))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        key_cache, value_cache, *scales = kv_cache
        return self.kernels.attention(
            query, key, value, key_cache, value_cache, metadata, sliding_window=self.config.sliding_window,
            kv_scales=scales[0] if scales else None,
        )  # fmt: skip

    def _attend_whole(
        self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, whole: Whole, kv_cache: KVCache
    ) -> Tensor:
        """Whole sequences first, over a cache that the next layer uses again; then those that take what was kept."""
        n = whole.num_tokens
        attended = self._attend(query[:n], key[:n], value[:n], whole.attention, whole.cache)
        for keep in whole.keeps:
            key_cache, value_cache, *scales = kv_cache
            kept = select(query, key, value, keep, self.group)
            self.kernels.write_kv(*kept, key_cache, value_cache, keep.slots, kv_scales=scales[0] if scales else None)
        if n == len(query):
            return attended
        return torch.cat((attended, self._attend(query[n:], key[n:], value[n:], batch.attention, kv_cache)))

    def _normed_and_turned(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after whatever this layer does to them before they meet."""
        if self.q_norm is not None and self.k_norm is not None:
            if self.config.qk_norm == "head" and self.rotary is not None:  # both in one pass over memory
                weights = self.q_norm.weight, self.k_norm.weight
                return self.kernels.qk_norm_rope(query, key, *weights, *self.rotary, positions, self.q_norm.eps)
            if self.config.qk_norm == "projection" and self.group.size > 1:
                query, key = self._normed_together(query, key, self.q_norm, self.k_norm)
            else:
                query, key = (
                    norm(heads.flatten(1).unflatten(-1, (-1, len(norm.weight)))).view(heads.shape)
                    for norm, heads in ((self.q_norm, query), (self.k_norm, key))
                )
        if self.rotary is not None:
            query, key = self.kernels.apply_rotary_emb(query, key, *self.rotary, positions)
        return query, key

    def _normed_together(self, query: Tensor, key: Tensor, q_norm: Norm, k_norm: Norm) -> tuple[Tensor, Tensor]:
        """RMSNorm over all heads of a projection, where each rank has some of them: the squares are summed over ranks,
        and those of a KV head that several ranks have a copy of count once."""
        wide = torch.promote_types(query.dtype, torch.float32)
        num_copies = max(1, self.group.size // self.config.num_kv_heads)
        pairs = [(query.flatten(1).to(wide), q_norm, 1), (key.flatten(1).to(wide), k_norm, num_copies)]
        squares = self.group.sum(torch.stack([x.square().sum(-1) / copies for x, _, copies in pairs], dim=1))
        query, key = (
            norm.weight * (x * torch.rsqrt(total[:, None] / norm.span.total + norm.eps)).to(norm.weight.dtype)
            for (x, norm, _), total in zip(pairs, squares.unbind(1), strict=True)
        )
        return query.unflatten(-1, (-1, self.config.head_dim)), key.unflatten(-1, (-1, self.config.head_dim))
