"""The one shape in which work reaches a model."""

from dataclasses import dataclass

from torch import Tensor

from mini_infer.kernels import AttentionMetadata


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, flattened into one row of T tokens without padding.

    Attributes:
        token_ids: int64 ``[T]``.
        positions: int64 ``[T]``, each token's index in its own sequence.
        attention: whose tokens they are, where their keys and values go, and what they see.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
