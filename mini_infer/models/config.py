"""What a model is made of, in one shape for every family: plain data, which `families` read and `Decoder` builds."""

from dataclasses import dataclass
from typing import Literal

import torch

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.memory.cache_spec import PagedKV
from mini_infer.models.quantization import Quantization
from mini_infer.models.rope import Rope
from mini_infer.parallel.share import WHOLE, Share

DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

LARGEST_SIZE = 2**31 - 1
"""Of anything that is counted: kernels index with 32 bits."""


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves num_heads / num_kv_heads query heads.
        head_dim: features per head; num_heads * head_dim need not be hidden_size.
        rope: how queries and keys are rotated; None leaves them as they are, and the layer blind to positions.
        qkv_bias: the query, key and value projections have biases.
        output_bias: the output projection has one.
        qk_norm: what is normalised of queries and keys before their rotation: every head by itself, all heads of a
            projection together, or nothing.
        sliding_window: how many of the latest tokens a token sees, itself included; None is all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise InvalidCheckpointError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.sliding_window is not None:
            _check_sizes(self, "sliding_window")
        if self.rope is not None:
            if self.head_dim % 2:
                raise InvalidCheckpointError(f"head_dim must be even, for RoPE turns pairs; got {self.head_dim}")
            self.rope.check(self.head_dim)

    def cache_spec(self, dtype: torch.dtype, share: Share = WHOLE) -> PagedKV:
        """What a share of the layer keeps of every token, if it keeps ``dtype``."""
        return PagedKV(len(share.kv_heads(self.num_kv_heads)), self.head_dim, dtype)


@dataclass(frozen=True)
class FeedForwardConfig:
    """SwiGLU.

    Attributes:
        intermediate_size: width between the two halves.
        bias: its projections have biases.
    """

    intermediate_size: int
    bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "intermediate_size")


@dataclass(frozen=True)
class LayerConfig:
    """Two slots, and where the residual stream is normalised: before each, after each, or both."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norms: Literal["pre", "post", "both"] = "pre"


@dataclass(frozen=True)
class DiffusionConfig:
    """What makes a model one of masked diffusion: it says what belongs into gaps, and sees both sides of them.

    Attributes:
        mask_token_id: stands for a gap.
        span: how many neighbouring tokens see each other, as in `paged_prefill_attention`; None is all of a sequence.
        shift: 1 where the logits after a token are for the next one, as in an autoregressive model; 0 where they are
            for the token itself.
    """

    mask_token_id: int
    span: int | None = None
    shift: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and options.

    Attributes:
        architecture: its name in config.json; one of `families.FAMILIES`.
        vocab_size: rows of the embedding, which may exceed the tokenizer's vocabulary.
        hidden_size: width of the residual stream.
        layers: the decoder layers, first to last.
        max_position_embeddings: the longest context, in tokens: config.json's own figure, or how far its RoPE
            extension reaches if that is more.
        rms_norm_eps: keeps the norm of a zero vector finite.
        tie_word_embeddings: the output projection is the embedding.
        dtype: of the checkpoint's weights; None where its config does not say.
        quantization: how its matrices are written down; None is as plain numbers, or as the files themselves say.
        diffusion: how it fills in masks; None for a model that writes one token after the other.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: torch.dtype | None
    quantization: Quantization | None = None
    diffusion: DiffusionConfig | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "vocab_size", "hidden_size", "num_layers", "max_position_embeddings")
        if not 0 <= self.rms_norm_eps < float("inf"):
            raise InvalidCheckpointError(f"rms_norm_eps must be finite and not negative; got {self.rms_norm_eps}")
        if self.diffusion is not None:
            mask = self.diffusion.mask_token_id
            if not isinstance(mask, int) or not 0 <= mask < self.vocab_size:
                raise InvalidCheckpointError(
                    f"mask_token_id must be a token, an integer from 0 to {self.vocab_size - 1}; got {mask!r}"
                )
            span = self.diffusion.span
            if span is not None and (type(span) is not int or not 1 <= span <= LARGEST_SIZE):
                raise InvalidCheckpointError(f"block_size must be an integer of at least 1; got {span!r}")
            if any(layer.attention.sliding_window is not None for layer in self.layers):
                raise UnsupportedModelError("sliding_window must not be used in a diffusion model")

    @property
    def attention_span(self) -> int:
        """How many neighbouring tokens see each other, counted from a sequence's first; 1 is causal."""
        return 1 if self.diffusion is None else self.diffusion.span or LARGEST_SIZE

    @property
    def computes_whole(self) -> bool:
        """Whether every token sees all others, so that a step computes all of a sequence and needs no cache."""
        return self.diffusion is not None and self.diffusion.span is None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def cache_specs(self, dtype: torch.dtype, share: Share = WHOLE) -> tuple[PagedKV, ...]:
        """What each layer of a share of the model keeps, if they keep ``dtype``."""
        return tuple(
            layer.attention.cache_spec(dtype, share)
            for layer in self.layers[share.layers(self.num_layers).of(self.num_layers)]
        )


def _check_sizes(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
            raise InvalidCheckpointError(f"{name} must be an integer from 1 to {LARGEST_SIZE}; got {value!r}")
