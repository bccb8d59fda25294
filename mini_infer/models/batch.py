"""The one shape in which work reaches a model."""

from dataclasses import dataclass

from torch import Tensor

from mini_infer.kernels import AttentionMetadata
from mini_infer.models.keeping import Keep

KVCache = tuple[Tensor, ...]
"""One layer's key and value cache, and scales of codes, as `allocate_kv_cache` made them; only kernels look inside."""


@dataclass(frozen=True)
class Whole:
    """The leading sequences of a step that are computed from their first token to their last: they read nobody's keys
    and values but their own, so that these need a place only until the layer is done.

    Attributes:
        num_tokens: how many of the step's tokens are theirs.
        attention: of these.
        cache: the place, the same for every layer.
        keeps: what stays of them.
    """

    num_tokens: int
    attention: AttentionMetadata
    cache: KVCache
    keeps: tuple[Keep, ...]


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, flattened into one row of T tokens without padding.

    Attributes:
        token_ids: int64 ``[T]``.
        positions: int64 ``[T]``, each token's index in its own sequence.
        attention: whose tokens they are, where their keys and values go, and what they see; of all but the whole ones.
        whole: the leading sequences of a diffusion model that are computed whole; None if there are none.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
    whole: Whole | None = None
