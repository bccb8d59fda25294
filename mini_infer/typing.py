"""Types that user code annotates with."""

from typing import Any, Protocol, TypeAlias

TokenIds: TypeAlias = list[int]
"""Token ids, in order."""

BlockTable: TypeAlias = list[int]
"""A sequence's block ids: logical block ``i`` (tokens ``i * block_size`` and on) is physical block ``table[i]``."""


class SequenceMetadata(Protocol):
    """What runs of a sequence, for annotations of code that walks sequences; the scheduler's ``Sequence`` is one."""

    @property
    def token_ids(self) -> TokenIds:
        """Prompt and generated tokens."""

    @property
    def num_computed_tokens(self) -> int:
        """How many of them have their keys and values in the cache."""

    @property
    def block_table(self) -> BlockTable:
        """The blocks that hold those, and the ones about to be computed."""


class SchedulingPolicy(Protocol):
    """Orders sequences: the smallest key runs first and is preempted last."""

    def key(self, sequence: Any) -> tuple[float, ...]:
        """The key of a ``Sequence`` that has just arrived, and has its ``arrival``; among equal keys that decides."""
