"""What a model is given in one step."""

from dataclasses import dataclass

from torch import Tensor

from mini_infer.kernels import AttentionMetadata


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, flattened into one row of tokens without padding.

    Attributes:
        token_ids: int64 ``[T]``.
        positions: int64 ``[T]``, each token's index in its own sequence.
        attention: which tokens belong together, where they are written and what they see.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
