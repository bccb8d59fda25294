"""The one model: a decoder-only transformer, put together from a `ModelConfig`.

`Decoder` turns tokens into hidden states and those into logits; `Layer` is what it repeats, and has two slots:
attention and feed-forward. Every operation that takes noticeable time is either a matrix product or one of
`mini_infer.kernels`. Inference only: no parameter has a gradient.

In the shapes below a batch has T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mini_infer.kernels import Kernels
from mini_infer.models.attention import Attention, RotaryTables
from mini_infer.models.batch import Batch, KVCache
from mini_infer.models.config import FeedForwardConfig, LayerConfig, ModelConfig
from mini_infer.models.linear import Embedding, Linear, Norm
from mini_infer.models.rope import Rope, rotary_tables
from mini_infer.parallel.share import WHOLE, Share


class Decoder(nn.Module):
    """Embedding, layers, final norm and output projection.

    Parameters have a shape and a dtype but no memory until `load_model` fills them.

    Args:
        config: what to build.
        dtype: of every parameter.
        device: where the rotary tables live; on "meta" the whole model takes no memory.
        kernels: who computes.
        share: which part of it to build.

    Attributes:
        span: its layers, among those of the whole model.
        num_parameters: numbers in all parameters; a tied embedding counts once.
        weight_bytes: what these take.
        rotary_bytes: what the rotary tables take.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: str | torch.device,
        kernels: Kernels,
        share: Share = WHOLE,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.kernels, self.share = config, dtype, kernels, share
        self._token_widths = share.token_widths(config.vocab_size)
        self.span, self.tokens = share.layers(config.num_layers), share.tokens(config.vocab_size)
        hidden_size, is_tied = config.hidden_size, config.tie_word_embeddings
        self.embedding = self.norm = self.output = None
        # A tied embedding is the output layer's weight, and looked up there.
        if share.is_first and not is_tied:
            self.embedding = Embedding(self.tokens, hidden_size, dtype)
        tables = _rotary_tables(config, torch.device(device))
        mine = config.layers[self.span.start : self.span.stop]
        self.layers = nn.ModuleList(Layer(config, layer, tables, dtype, kernels, share) for layer in mine)
        if share.is_last:
            self.norm = Norm(hidden_size, config.rms_norm_eps, dtype, kernels)
        if share.is_last or (share.is_first and is_tied):
            self.output = Linear(hidden_size, [self.tokens], False, dtype, kernels)
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters())  # packed ones are not listed
        self.weight_bytes = sum(parameter.nbytes for parameter in self.parameters())
        self.rotary_bytes = sum(table.nbytes for pair in tables.values() for table in pair)

    def forward(self, batch: Batch, kv_cache: Sequence[KVCache], arriving: Tensor | None = None) -> Tensor:
        """Run one step's tokens through the layers, adding their keys and values to the cache.

        Args:
            batch: the tokens, where they stand and where their keys and values go.
            kv_cache: one for each layer, as `allocate_kv_cache` makes it.
            arriving: what the stage before gave; None in the first.

        Returns:
            Hidden states after the final norm, ``[T, hidden_size]``. Of a stage that others follow, what they need:
            ``[2, T, hidden_size]``, the last result and the stream that it is still to be added to.
        """
        if arriving is None:
            hidden, residual = self._embed(batch.token_ids), None
        else:
            hidden, residual = arriving
        for layer, layer_cache in zip(self.layers, kv_cache, strict=True):
            hidden, residual = layer(hidden, residual, batch, layer_cache)
        assert residual is not None  # there is a layer
        return torch.stack((hidden, residual)) if self.norm is None else self.norm.add(hidden, residual)[0]

    def _embed(self, token_ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, hidden_size]``. Who lacks a token's row adds zeros."""
        if self.tokens.is_whole:
            return self._rows(token_ids)
        places = token_ids - self.tokens.start
        is_mine = (places >= 0) & (places < len(self.tokens))
        rows = self._rows(places.clamp(0, len(self.tokens) - 1))
        return self.share.group.sum(rows.masked_fill(~is_mine[:, None], 0))

    def _rows(self, places: Tensor) -> Tensor:
        table = self.output if self.embedding is None else self.embedding
        assert table is not None
        return table.rows(places)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """Scores of every next token, ``[N, vocab_size]``, for the rows ``[N, hidden_size]`` of the last stage's
        `forward`; where several share it, only the first has them, and the others get None."""
        output = self.output
        assert output is not None
        return self.share.group.gather(output(hidden), self._token_widths)


class Layer(nn.Module):
    """Attention, then feed-forward; what each gives is added to the residual stream.

    The addition is left to whoever reads the stream next: with a norm it is one pass over memory.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: LayerConfig,
        tables: dict[tuple[Rope, int], RotaryTables],
        dtype: torch.dtype,
        kernels: Kernels,
        share: Share,
    ) -> None:
        super().__init__()

        def norm(where: str) -> Norm | None:
            wanted = config.norms in (where, "both")
            return Norm(model.hidden_size, model.rms_norm_eps, dtype, kernels) if wanted else None

        attention = config.attention
        rotary = None if attention.rope is None else tables[attention.rope, attention.head_dim]
        self.attention_norm = norm("pre")
        self.attention = Attention(model.hidden_size, attention, model.rms_norm_eps, rotary, dtype, kernels, share)
        self.attention_post_norm = norm("post")
        self.feed_forward_norm = norm("pre")
        self.feed_forward = FeedForward(model.hidden_size, config.feed_forward, dtype, kernels, share)
        self.feed_forward_post_norm = norm("post")

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: Batch, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """Take and give ``[T, hidden_size]`` twice: the last result, and the stream that it is still to be added to,
        which the first layer has none of."""
        hidden, residual = _read(hidden, residual, self.attention_norm)
        hidden = self.attention(hidden, batch, kv_cache)
        if self.attention_post_norm is not None:
            hidden = self.attention_post_norm(hidden)
        hidden, residual = _read(hidden, residual, self.feed_forward_norm)
        hidden = self.feed_forward(hidden)
        if self.feed_forward_post_norm is not None:
            hidden = self.feed_forward_post_norm(hidden)
        return hidden, residual


def _read(hidden: Tensor, residual: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(what a slot gets, the stream): ``hidden`` is added to the stream, and the sum normalised if there is a norm."""
    if residual is None:
        return hidden if norm is None else norm(hidden), hidden
    if norm is not None:
        return norm.add(hidden, residual)
    stream = hidden + residual
    return stream, stream


class FeedForward(nn.Module):
    """SwiGLU, with one projection for the gate and what it gates; of its features, a share."""

    def __init__(
        self, hidden_size: int, config: FeedForwardConfig, dtype: torch.dtype, kernels: Kernels, share: Share
    ) -> None:
        super().__init__()
        self.kernels, self.group = kernels, share.group
        features = share.features(config.intermediate_size)
        self.gate_up_proj = Linear(hidden_size, 2 * [features], config.bias, dtype, kernels)
        self.down_proj = Linear(features, [hidden_size], config.bias and self.group.rank == 0, dtype, kernels)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[T, hidden_size]`` to ``[T, hidden_size]``."""
        return self.group.sum(self.down_proj(self.kernels.silu_and_mul(self.gate_up_proj(hidden))))


def _rotary_tables(config: ModelConfig, device: torch.device) -> dict[tuple[Rope, int], RotaryTables]:
    """One pair of tables for each way to rotate, which layers share."""
    wanted = {(layer.attention.rope, layer.attention.head_dim) for layer in config.layers}
    tables = {}
    with torch.device("meta" if device.type == "meta" else "cpu"):
        for rope, head_dim in wanted:
            if rope is not None:
                cos, sin = rotary_tables(rope, head_dim, config.max_position_embeddings)
                tables[rope, head_dim] = cos.to(device), sin.to(device)
    return tables
