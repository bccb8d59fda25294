"""The one model: a decoder-only transformer that covers Llama, Mistral, Qwen2 and Qwen3.

`Decoder` turns tokens into hidden states and those into logits; `Layer` is what it repeats; `Attention` and
`FeedForward` are the two halves of a layer. Every operation that takes noticeable time is either a matrix product or
one of `mini_infer.kernels`. Inference only: no parameter has a gradient.

In the shapes below a batch has T tokens; H query heads and K key-value heads have D features each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mini_infer.kernels import Kernels
from mini_infer.models.batch import Batch
from mini_infer.models.config import ModelConfig
from mini_infer.models.rope import rotary_tables

KVCache = tuple[Tensor, Tensor]
"""One layer's key and value cache, as `kernels.allocate_kv_cache` made them; only kernels look inside."""


class Decoder(nn.Module):
    """Embedding, layers, final norm and output projection.

    Parameters have a shape and a dtype but no memory until `load_model` fills them.

    Attributes:
        config: what the model was built from.
        dtype: of every parameter.
        num_parameters: numbers in all of them; a tied embedding counts once.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: str | torch.device, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.dtype = dtype
        # A tied embedding is the output layer's weight, and looked up there.
        tied = config.tie_word_embeddings
        self.embedding = None if tied else _parameter((config.vocab_size, config.hidden_size), dtype)
        self.layers = nn.ModuleList(Layer(config, window, dtype, kernels) for window in config.sliding_windows)
        self.norm = _parameter((config.hidden_size,), dtype)
        self.output = Linear(config.hidden_size, config.vocab_size, False, dtype, kernels)
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters())  # packed ones are not listed
        cos, sin = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def forward(self, batch: Batch, kv_cache: Sequence[KVCache]) -> Tensor:
        """Run one step's tokens through the layers, adding their keys and values to the cache.

        Args:
            batch: the tokens, where they stand and where their keys and values go.
            kv_cache: one (key_cache, value_cache) per layer, of the parameters' dtype.

        Returns:
            Hidden states after the final norm, ``[T, hidden_size]``.
        """
        if self.embedding is None:
            hidden = self.output.rows(batch.token_ids)
        else:
            hidden = functional.embedding(batch.token_ids, self.embedding)
        residual = torch.zeros_like(hidden)
        for layer, layer_cache in zip(self.layers, kv_cache, strict=True):
            hidden, residual = layer(hidden, residual, batch, layer_cache, (self.cos, self.sin))
        hidden, _ = self.kernels.add_rmsnorm(hidden, residual, self.norm, self.config.rms_norm_eps)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, ``[N, vocab_size]``, for the rows ``[N, hidden_size]`` of `forward`'s result."""
        logits: Tensor = self.output(hidden)
        return logits


class Layer(nn.Module):
    """Attention, then feed-forward; each reads a normalised residual stream, and its result is added to the stream.

    The addition is left to the next norm, which does both in one pass over memory.
    """

    def __init__(self, config: ModelConfig, sliding_window: int | None, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.eps = config.rms_norm_eps
        self.attention_norm = _parameter((config.hidden_size,), dtype)
        self.attention = Attention(config, sliding_window, dtype, kernels)
        self.feed_forward_norm = _parameter((config.hidden_size,), dtype)
        self.feed_forward = FeedForward(config, dtype, kernels)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor,
        batch: Batch,
        kv_cache: KVCache,
        rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Take and give ``[T, hidden_size]`` twice: the last result, and the stream that it is still to be added to."""
        hidden, residual = self.kernels.add_rmsnorm(hidden, residual, self.attention_norm, self.eps)
        hidden = self.attention(hidden, batch, kv_cache, rotary)
        hidden, residual = self.kernels.add_rmsnorm(hidden, residual, self.feed_forward_norm, self.eps)
        hidden = self.feed_forward(hidden)
        return hidden, residual


class Attention(nn.Module):
    """Grouped-query attention over the paged cache, with one projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, sliding_window: int | None, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.head_counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.sliding_window = sliding_window
        self.kernels = kernels
        self.eps = config.rms_norm_eps
        self.qkv_proj = Linear(config.hidden_size, sum(self.head_counts) * config.head_dim, config.qkv_bias, dtype, kernels)
        self.qk_norms = (
            nn.ParameterList(_parameter((config.head_dim,), dtype) for _ in "qk") if config.qk_norm else None
        )
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, config.output_bias, dtype, kernels)

    def forward(
        self, hidden: Tensor, batch: Batch, kv_cache: KVCache, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """``[T, hidden_size]`` to ``[T, hidden_size]``."""
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split(self.head_counts, dim=1)  # [T, H, D], [T, K, D], [T, K, D]
        if self.qk_norms is None:
            query, key = self.kernels.apply_rotary_emb(query, key, *rotary, batch.positions)
        else:
            q_norm, k_norm = self.qk_norms
            query, key = self.kernels.qk_norm_rope(query, key, q_norm, k_norm, *rotary, batch.positions, self.eps)
        attended = self.kernels.attention(
            query, key, value, *kv_cache, batch.attention, sliding_window=self.sliding_window
        )
        output: Tensor = self.o_proj(attended.flatten(1))
        return output


class FeedForward(nn.Module):
    """SwiGLU, with one projection for the gate and what it gates."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias, dtype, kernels)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, dtype, kernels)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[T, hidden_size]`` to ``[T, hidden_size]``."""
        output: Tensor = self.down_proj(self.kernels.silu_and_mul(self.gate_up_proj(hidden)))
        return output


class Linear(nn.Module):
    """x Wᵀ + b, by way of `kernels.pack_linear`.

    Attributes:
        weight: ``[outputs, inputs]``; gone once it is packed.
        bias: ``[outputs]``, or None.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight: nn.Parameter | None = _parameter((outputs, inputs), dtype)
        self.bias = _parameter((outputs,), dtype) if bias else None

    def pack(self) -> None:
        """Hand the weight to the kernels, which may keep it in another order."""
        assert self.weight is not None
        self._product = self.kernels.pack_linear(self.weight, self.bias)
        self.weight = None

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, ``[N, inputs]``, for ids ``[N]``."""
        return self._product.rows(ids)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``, without a module's detour by way of its hooks."""
        return self._product(x)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
