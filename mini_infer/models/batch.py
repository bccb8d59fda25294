"""The one shape in which work reaches a model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, flattened into one row of tokens without padding.

    T tokens of S sequences. Sequences with a single new token (decodes) come first, prompt chunks after them, so
    that attention can treat each kind with the kernel made for it.

    Attributes:
        token_ids: int64 ``[T]``.
        positions: int64 ``[T]``, each token's index in its own sequence.
        slot_mapping: int64 ``[T]``, where each token's key and value go: ``block_id * block_size + offset``.
        query_start: int32 ``[S + 1]``; sequence ``s`` owns tokens ``query_start[s]:query_start[s + 1]``.
        context_lens: int32 ``[S]``, tokens of each sequence in the cache once this step's are written.
        block_tables: int32 ``[S, max_blocks]``, block ids; entries beyond a sequence's own blocks are arbitrary.
        num_decodes: how many leading sequences have exactly one new token.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    num_decodes: int
